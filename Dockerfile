# Any Debian-like image with Python 3.11 or newer and pip; for a card, one with CUDA drivers' libraries will do as well,
# since torch's wheels bring their own CUDA runtime.
ARG BASE=python:3.11-slim
FROM ${BASE}

# Extra options for pip, such as --index-url with an index of CPU-only torch builds.
ARG PIP_OPTIONS=""
# Debian packages to add. A card's kernels are compiled at the first start, with gcc and Python's headers: without them
# they are left out, and forwards are slower.
ARG PACKAGES=""
RUN if [ -n "${PACKAGES}" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends ${PACKAGES} && rm -rf /var/lib/apt/lists/*; \
    fi

WORKDIR /srv/unstir
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY model model
RUN python3 -m venv /opt/unstir \
    && /opt/unstir/bin/pip install --no-cache-dir ${PIP_OPTIONS} --editable . \
    && useradd --system --no-create-home unstir \
    && install --directory --owner unstir /var/cache/unstir
COPY weights weights

# What is measured and compiled at the first start; a volume there spares the next container both.
ENV UNSTIR_CACHE=/var/cache/unstir TRITON_CACHE_DIR=/var/cache/unstir/triton
ENV UNSTIR_HOST=0.0.0.0 UNSTIR_PORT=8000
EXPOSE 8000
USER unstir
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s --interval=10s --timeout=3s \
    CMD /opt/unstir/bin/python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$UNSTIR_PORT/healthz', timeout=2)"
CMD ["/opt/unstir/bin/unstir", "serve"]
