"""The calibration windows' hidden states, layer by layer, and what is summed over them."""
