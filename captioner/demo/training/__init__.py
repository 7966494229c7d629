"""How the demo bundle was made. Runs from the repository; what is installed holds the bundle alone."""
