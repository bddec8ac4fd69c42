"""Packaging: every value comes from settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
statuses = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status'])-1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["dualreal", "dualreal.*"]),
    # An editable install is a path then, not an import hook: beside a hook, a clone's folder in the
    # working folder, dualreal/ without an __init__.py, would be taken for the package.
    package_dir={"": "."},
    # The toy base is data, not a package: named here, so that it is in the wheel and in the sdist alike.
    package_data={"dualreal": ["assets/**/*"]},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require={k: cfg[f"{k}_requirements"].split() for k in ("dev", "docs", "studio", "heif", "masks", "ray")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
