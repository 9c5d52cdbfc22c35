# Everything that running needs, on a GPU or a CPU:
#     docker build --tag higgs-tune .
#     docker run --rm higgs-tune                                              the demo, on toy checkpoints
#     docker run --rm --gpus all --shm-size 16g --volume DATA:/data higgs-tune \
#         torchrun --nproc_per_node 8 -m higgs_tune.train --config examples/configs/8xh200.yaml …
# gcc is what torch.compile (--kernels compiled) needs.
FROM python:3.12-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /higgs-tune
COPY . .
RUN make setup-run
ENV PATH=/higgs-tune/.venv/bin:$PATH
CMD ["make", "demo", "SETUP=setup-run"]
