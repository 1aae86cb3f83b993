PYTHON ?= python3
BIN := .venv/bin

.PHONY: env demo test check

env: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install -r requirements.txt
	touch .venv/ready

demo: env
	$(BIN)/python data_utils.py
	$(BIN)/python train.py
	$(BIN)/python infer_finetuning.py --query 从南京到上海的路线
	printf '南京有什么好吃的？\n第一种怎么做？\n' | $(BIN)/python infer_finetuning.py

test: env
	$(BIN)/python -m pytest -q

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q
