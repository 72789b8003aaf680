# make animation   set up, run notebooks/pnp.ipynb and write anim.gif
# make test        set up, lint, run the unit tests, animate in short mode and re-run every notebook
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed

# Seconds that one cell of a notebook may take before the command ends and names it; long footage needs more.
LIMIT ?= 1800

export TF_CPP_MIN_LOG_LEVEL ?= 3
export NO_ALBUMENTATIONS_UPDATE = 1
export PYDEVD_DISABLE_FILE_VALIDATION = 1

.PHONY: animation test lab lock data train eval bench compare hero browser blender notebooks clean

RUN_NOTEBOOK = $(BIN)/python tests/run_notebook.py --limit $(LIMIT)
ANIMATION = $(RUN_NOTEBOOK) --output-dir .venv/executed notebooks/pnp.ipynb

animation: $(STAMP)
	$(ANIMATION)
	@ls -l anim.gif

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pytest -n 2 --dist loadfile tests
	XWING_SMOKE=1 $(ANIMATION)
	XWING_SMOKE=1 $(BIN)/pytest --nbval-lax --nbval-cell-timeout=900 notebooks

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	# Both OpenCV packages write the same files; the headless one goes last, so that no libGL is needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps \
	    $$(grep -o '^opencv-python-headless==[^ ]*' requirements.txt)
	# The project itself, so that notebooks import it from any folder.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# Pin everything that requirements.in asks for; what is pinned in requirements.txt already stays.
lock: $(STAMP)
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --allow-unsafe --strip-extras \
	    --annotation-style=line --no-emit-index-url --no-emit-find-links --no-emit-trusted-host requirements.in

lab: $(STAMP)
	$(BIN)/jupyter lab --ServerApp.root_dir=. notebooks/reference.ipynb

data: $(STAMP)
	$(BIN)/python data/render.py data/train --count 10000 --seed 1

# One cell trains for hours.
train: LIMIT = 604800
train: $(STAMP)
	$(RUN_NOTEBOOK) --inplace notebooks/train.ipynb

# The panel goes to the terminal, weights/xwing_eval.json and the README.
eval: $(STAMP)
	$(RUN_NOTEBOOK) --inplace notebooks/eval.ipynb notebooks/eval_tracks.ipynb
	@$(BIN)/python -c 'import xwing_utils as xu; from xwing import evaluation; \
	    found = xu.read_json("weights/xwing_eval.json"); \
	    print(evaluation.results_table(found["figures"], found["intervals_95"]).to_string())'

bench: $(STAMP)
	$(BIN)/python tests/bench.py

# Track data/flight_hd.mp4 and write images/hero.mp4 and images/hero.gif.
hero: $(STAMP)
	$(BIN)/python tools/hero.py

# Run notebooks in JupyterLab in Debian's Chromium (/usr/bin/chromium) and look for what is broken.
browser: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright
	$(BIN)/pytest tests/test_browser.py

# Import an exported track into real Blender and compare. bpy is GPL and wants another numpy, so it is no
# dependency and has an environment of its own.
blender: $(STAMP)
	@test -x .venv-blender/bin/python || $(PYTHON) -m venv .venv-blender
	@.venv-blender/bin/python -c 'from bpy import app' 2>/dev/null || \
	    .venv-blender/bin/python -m pip install --quiet --disable-pip-version-check bpy==5.0.1 || true
	@if .venv-blender/bin/python -c 'from bpy import app' 2>/dev/null; then $(BIN)/python tests/blender/check.py; \
	    else echo "make blender: skipped, because bpy 5.0.1 (Blender for Python 3.11) is not installed"; fi

# Tables of weights/EXPERIMENTS.md: what a training step costs, and what encoders, losses and
# augmentations do for the result.
compare: $(STAMP)
	$(BIN)/python tools/compare_training.py

# Execute all notebooks but train in place and keep their outputs.
notebooks: $(STAMP)
	$(RUN_NOTEBOOK) --inplace notebooks/reference.ipynb notebooks/eval.ipynb \
	    notebooks/eval_tracks.ipynb notebooks/pnp.ipynb notebooks/own.ipynb

clean:
	rm -rf .venv .venv-blender .pytest_cache .ruff_cache weights/.openvino
