# Each target alone does all the set-up on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
RUNS := .venv/installed-run
INSTALLED := .venv/installed
SETUP ?= setup
OPTIONAL := $(CURDIR)/runs/optional
TOY := runs/toy
DEMO := runs/demo
TOY_DEMO := runs/toy-demo
SAY := --audio_tokenizer_path $(TOY)/codec --layout chat --max_seconds 4 \
    --ref_audio examples/arabic/clips/amal-01.flac --ref_text "ذَهَبَ الوَلَدُ إِلَى المَدْرَسَةِ مُبَكِّرًا." \
    --text "السَّلَامُ عَلَيْكُمْ وَرَحْمَةُ اللهِ."
TRAIN := $(BIN)/torchrun --standalone --nproc_per_node 2 -m higgs_tune.train
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: setup setup-run toy toy-demo demo test test-fast test-optional native lint bench clean

# for development: all that is here; SETUP=setup-run makes the other targets do with setup-run, where they can
setup: $(INSTALLED)

# for running only: no tests, linters, Ray
setup-run: $(RUNS)

# torch first, with the libraries that its build asks for; then everything else exactly as pinned
$(RUNS): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) --constraint requirements.lock torch
	$(PIP) --no-deps --requirement requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(INSTALLED): $(RUNS) requirements-dev.lock
	$(PIP) --no-deps --requirement requirements-dev.lock
	mkdir -p .venv/types && ln -sfn ../.. .venv/types/higgs_tune
	touch $@

# make toy TOWER=1 gives the model a Whisper tower
toy: $(SETUP)
	$(BIN)/python -m higgs_tune.train.toy --chatml examples/arabic/chatml.json --out $(TOY) $(if $(TOWER),--tower)

# a small trained model that speaks English learns to say Arabic digits: words to hear and figures, in minutes
demo: $(SETUP)
	BIN=$(BIN) examples/miniature/demo.sh $(DEMO)

# real speech -> shards -> stage 1 -> stage 2 (stopped half-way, resumed) -> report -> a sentence, on the toy checkpoints
toy-demo: toy
	rm -rf $(TOY_DEMO)
	$(BIN)/higgs-preprocess --data examples/arabic/chatml.json --out $(TOY_DEMO)/shards \
	    --model_path $(TOY)/model --audio_tokenizer_path $(TOY)/codec --val_fraction 0.1
	$(TRAIN) --training_stage stage1 --model_path $(TOY)/model --train_data_dir $(TOY_DEMO)/shards \
	    --output_dir $(TOY_DEMO)/stage1 --max_steps 60 --tokens_per_pack 2048 --learning_rate 1e-2 --eval_steps 20
	for steps in 60 120; do \
	    $(TRAIN) --training_stage stage2 --model_path $(TOY_DEMO)/stage1 --train_data_dir $(TOY_DEMO)/shards \
	        --output_dir $(TOY_DEMO)/stage2 --max_steps $$steps --tokens_per_pack 2048 --learning_rate 1e-2 \
	        --lr_scheduler_type constant --eval_steps 30 --save_steps 30 --sample_steps 60 --num_samples 2 \
	        --sample_max_seconds 4 --resume_from_checkpoint auto || exit 1; \
	done
	$(BIN)/higgs-inspect report $(TOY_DEMO)/shards -o $(TOY_DEMO)/report.html --run $(TOY_DEMO)/stage2
	$(BIN)/python examples/closing_table.py $(TOY_DEMO)
	$(BIN)/higgs-speak --model_path $(TOY)/model $(SAY) -o $(TOY_DEMO)/spoken/base.wav
	$(BIN)/higgs-speak --model_path $(TOY_DEMO)/stage2 $(SAY) -o $(TOY_DEMO)/spoken/stage2.wav

# what a machine without a GPU can measure, in an hour or more on two idle cores; OMP_NUM_THREADS is yours to set. The
# export is of a small checkpoint (the released size takes 26 GB of disk); loaders from PyPI count where installed
bench: setup
	cd bench && ../$(BIN)/python train_step.py --size small
	cd bench && ../$(BIN)/python growth.py --size small --packs 2048 4096 8192 --lengths 128 512 2048 --length_pack 4096
	cd bench && ../$(BIN)/python lora_kinds.py --size small --positions 1024
	cd bench && ../$(BIN)/python train_loop.py --size small --steps 12 --tokens_per_pack 2048
	cd bench && ../$(BIN)/python -m models.roofline
	cd bench && ../$(BIN)/python -m models.scale_sim
	cd bench && ../$(BIN)/python plan.py --samples 10000 100000 1000000
	cd bench && ../$(BIN)/python loader.py --samples 2000 --rounds 3
	cd bench && ../$(BIN)/python loader_peers.py --samples 2000 --rounds 3
	cd bench && ../$(BIN)/python preprocess.py --shares 8 --samples 8 --rounds 2
	cd bench && ../$(BIN)/python generate.py --size small
	cd bench && ../$(BIN)/python export.py --size small

# the tests of the report in a browser are skipped without Chromium (Debian: apt-get install chromium chromium-driver)
test: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# a quick test or two of every file, in less than two minutes
test-fast: setup
	$(BIN)/pytest -n 2 --dist loadfile -m fast

# the tests that need bitsandbytes and triton; both are downloaded (250 MB) into a folder beside .venv, and must import,
# so that no test is skipped for want of them
test-optional: export PYTHONPATH := $(OPTIONAL)/packages$(PYTHONPATH:%=:%)
test-optional: $(OPTIONAL)/installed
	$(BIN)/python -c "import bitsandbytes, triton"
	$(BIN)/pytest -n 2 --dist loadfile tests/test_quantized.py tests/test_triton_kernels.py

$(OPTIONAL)/installed: $(INSTALLED)
	$(PIP) --no-deps --upgrade --target $(OPTIONAL)/packages bitsandbytes==0.50.2 triton==3.7.1
	touch $@

# parity with transformers' own class, in an environment of its own that this downloads: tests/native/README.md
native: setup
	$(BIN)/python tests/native/compare.py
	$(BIN)/python tests/native/exports.py
	$(BIN)/python tests/native/loaders.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error

clean:
	rm -rf runs build *.egg-info
