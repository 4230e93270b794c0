"""From sensitivities to a plan: which sites are decided, under which limits, by which method."""
