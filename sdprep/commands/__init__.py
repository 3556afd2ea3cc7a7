"""The commands of `sdprep`: parse, call, print. Imports that cost time are inside them."""
