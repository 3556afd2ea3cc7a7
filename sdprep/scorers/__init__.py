"""Numbers that say how good an image is: one module a scorer."""
