"""The lab: methods of allocation against one another on one model, at equal bytes, with intervals."""
