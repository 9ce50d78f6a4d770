# What continuous integration runs is `make check`; where make is missing, each line works as it stands.
.PHONY: check format test

check:
	./run ruff format --check
	./run ruff check
	./run mypy
	./run pytest

format:
	./run ruff format
	./run ruff check --fix

test:
	./run pytest
