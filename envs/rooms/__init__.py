"""Furnished rooms seen by a walker: scenes, commands, captions, edits and tales."""
