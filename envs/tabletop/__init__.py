"""The table-top: things, an arm with contact skills, tasks in words and what holds in physics."""
