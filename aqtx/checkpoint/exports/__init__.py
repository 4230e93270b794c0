"""The ways out: a quantized checkpoint in the form that another program loads, one file and one row per form."""
