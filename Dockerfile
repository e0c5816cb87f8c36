# A tuned model behind `skipkernels serve`. The run folder is mounted, read-only:
#
#   docker build -t skipkernels .                               # CPU
#   docker build -t skipkernels:cuda --build-arg TORCH=cu128 .  # CUDA; run it with --gpus all
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/photos:/model:ro" skipkernels
#
# TORCH is the end of an address of https://download.pytorch.org/whl. The wheels for CUDA bring its libraries.
FROM python:3.12-slim

ARG TORCH=cpu
RUN pip install --no-cache-dir "torch>=2.10" "torchvision>=0.25" --index-url "https://download.pytorch.org/whl/${TORCH}"

WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE LICENSES-pictograms ./
COPY csrc csrc
COPY skipkernels skipkernels
# Without a compiler in the image the operators run in PyTorch.
ENV SKIPKERNELS_CPP=0
RUN pip install --no-cache-dir ".[cli,web,heif]"

RUN useradd --create-home --uid 1000 app
USER app
WORKDIR /home/app
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# Exec form: SIGTERM of `docker stop` reaches the server.
ENTRYPOINT ["skipkernels", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
