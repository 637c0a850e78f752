# dinokit on PyTorch's image, which has Python, CUDA and torch; any tag with torch 2.11 or newer works (not yet built here).
#   docker build -t dinokit .
#   docker run --rm --gpus all --shm-size 8g -v PHOTOS:/photos:ro -v RUNS:/runs dinokit train data.path=/photos run.out=/runs/photos
# Without a GPU, leave out --gpus all. --shm-size is for the processes that load images.
ARG TORCH=2.14.1-cuda13.0-cudnn9-runtime
FROM pytorch/pytorch:${TORCH}
COPY . /opt/dinokit
# torch is in the image's own Python, which Ubuntu marks as its own: without this, pip refuses to install beside it.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN pip install --no-cache-dir '/opt/dinokit[cpu]' && dinokit --version
WORKDIR /runs
ENTRYPOINT ["dinokit"]
