# recjax on CPUs:
#   docker build -t recjax .
#   docker run --rm -v "$PWD:/work" recjax --config quickstart
FROM python:3.12-slim

COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints/python3.12.txt /src

# Runs write to runs/ of the folder that is mounted here.
RUN useradd --create-home --uid 1000 recjax && install -d -o recjax /work
USER recjax
WORKDIR /work
ENTRYPOINT ["recjax"]
