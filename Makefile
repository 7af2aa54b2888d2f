# `make demo` and `make test` set everything up on a machine that has nothing but Python 3.11 to 3.13.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help venv demo test slow images fuzz lint format types imports deps generated linters wire check proto released docs examples dashboards clean
.DEFAULT_GOAL := help

help: ## Show this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(INSTALLED) ## Make .venv, pinned by constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo 'swarm needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo 'Python has no venv here: apt-get install python3-venv' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peer,coordinator,data,evaluation,otel,bench,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target .venv/oracles byzfl
	@touch $@

demo: $(INSTALLED) ## Train a small model with a coordinator and three peers: make demo ARGS='--peers 2'
	$(BIN)/swarm demo $(ARGS)

test: $(INSTALLED) ## Run the tests that take seconds: make test ARGS='-k ledger'
	$(BIN)/pytest -m 'not slow and not gpu and not container' -n 2 $(ARGS)

slow: $(INSTALLED) ## Run the scenarios that take minutes
	$(BIN)/pytest -m slow -n 2 --dist worksteal $(ARGS)

images: $(INSTALLED) ## Build the images with podman, and let a peer in one train with a peer outside
	$(BIN)/pytest -m container $(ARGS)

fuzz: $(INSTALLED) ## Run the property tests with inputs that no run drew before: make fuzz ARGS='--hypothesis-seed 7'
	$(BIN)/pytest -m 'hypothesis and not slow' -n 2 --hypothesis-profile fuzz $(ARGS)

lint: $(INSTALLED) imports ## Check style and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## Lay the code out
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## Check types, strictly
	$(BIN)/mypy
	$(BIN)/mypy docs/generate.py docs/picture.py examples/make.py .ci/verdict.py

imports: $(INSTALLED) ## Check who imports whom
	$(BIN)/lint-imports

# psycopg is loaded by SQLAlchemy, by the name in the database's URL, and gguf by transformers.
deps: $(INSTALLED) ## Check that what is imported is declared, and the other way round
	$(BIN)/deptry . --exclude '\.venv|\.ci|tests|bench|docs|deploy' --optional-dependencies-dev-groups dev,bench \
		--per-rule-ignores 'DEP002=psycopg|gguf' \
		--package-module-name-map 'protobuf=google,grpcio=grpc,nvidia-ml-py=pynvml,pyyaml=yaml,grpcio-health-checking=grpc_health,pynacl=nacl'

generated: $(INSTALLED) ## Check that generated files are fresh
	$(BIN)/python -m swarm.rpc.generate --check
	$(BIN)/python -m deploy.dashboards --check
	$(BIN)/python docs/generate.py --check

linters: $(INSTALLED) ## Check images, the compose file and the Helm chart
	$(BIN)/hadolint deploy/docker/*.Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose/*.yaml
	$(BIN)/python -m deploy.charts

wire: $(INSTALLED) ## Check that the wire still understands that of the last release
	$(BIN)/buf lint
	$(BIN)/buf breaking --against proto/released

check: lint types deps generated linters wire test ## All of the above

proto: $(INSTALLED) ## Generate swarm/rpc/v1 from proto/
	$(BIN)/python -m swarm.rpc.generate

released: ## At a release: make the present wire the one that later changes are held against
	rm -rf proto/released/swarm
	cp -R proto/swarm proto/released/swarm

docs: $(INSTALLED) ## Generate docs/reference from the code
	$(BIN)/python docs/generate.py

examples: $(INSTALLED) ## Make the manifests in examples/ anew, by the commands of docs/recipes
	$(BIN)/python examples/make.py

dashboards: $(INSTALLED) ## Generate deploy/grafana/dashboards from the code
	$(BIN)/python -m deploy.dashboards

clean: ## Remove .venv and everything that tools leave behind
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage demo-run
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
