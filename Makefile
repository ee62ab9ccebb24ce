.PHONY: test heavy integration_test lint format notebooks docs

test:
	pytest

heavy:
	pytest -n 0 -m heavy

integration_test:
	pytest -n 0 -m "live or compile" tests/integration_tests

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

docs:
	mkdocs build --strict
