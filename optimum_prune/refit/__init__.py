"""New weights for what stays, in closed form."""
