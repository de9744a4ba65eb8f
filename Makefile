.PHONY: install check test smoke tables

install:
	pip install -e '.[test,lint]'

check:
	ruff check .
	ruff format --check .
	mypy
	codespell

test:
	pytest

smoke:
	ensdef run ci

tables:
	ensdef table --all --check
