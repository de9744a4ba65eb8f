.PHONY: install check test smoke tables replicate reliability speed speed-full

install:
	pip install -e '.[test,lint]'

check:
	ruff check .
	ruff format --check .
	mypy
	codespell

test:
	pytest -n auto

smoke:
	ensdef run ci

tables:
	ensdef table --all --check

# Every table of the papers, resumable: SCALE=smoke|mini|paper, RESULTS=folder, DATA=folder of images (mini)
SCALE = smoke
RESULTS = results
replicate:
	@failed=; for table in $(basename $(notdir $(wildcard benchmarks/papers/*.toml))); do \
	    ensdef run $$table --scale $(SCALE) --results $(RESULTS) $(if $(DATA),--data-dir $(DATA)) \
	    || failed="$$failed $$table"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# benchmarks/reliability/README.md
reliability:
	for script in kill tamper coverage fuzz; do python benchmarks/reliability/$$script.py || exit 1; done
	for locks in working off; do python benchmarks/reliability/processes.py --locks $$locks || exit 1; done

# benchmarks/speed/README.md; DATA=folder of images (default: the digits), CHECKPOINT=folder of a trained defence
SUBJECT = $(if $(DATA),--data-dir $(DATA)) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

speed:
	python benchmarks/speed/suite.py --size small $(SUBJECT)

speed-full:
	python benchmarks/speed/suite.py --size full $(SUBJECT)
