"""Training the routers alone, through quantized experts, to repair what rounding did to routing."""
