"""The verbs of `sdtrain`: parse, call, print. Each imports what it needs in its body."""
