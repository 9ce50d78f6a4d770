"""Robot tasks: reading keyframes, executing plans in physics, and scoring both."""
