.PHONY: test heavy integration_test lint format notebooks

test:
	pytest

heavy:
	pytest -m heavy

integration_test:
	pytest -m "live or compile" tests/integration_tests

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format:
	ruff check --fix .
	ruff format .

notebooks:
	python notebooks/renew.py
