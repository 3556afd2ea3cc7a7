"""Model families: all knowledge of one architecture sits in its module."""
