"""What a site loses when it is rounded: measured errors, and the costs that methods make of them."""
