"""What mkdocs calls: the plots of benchmarks/results are part of the site."""

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = "../benchmarks/results/"  # as pages say it, so that links work in the clone


def on_files(files, config):
    """Adds the plots that any page shows."""
    root = Path(config.config_file_path).parent
    pages = "".join(page.read_text() for page in Path(config.docs_dir).glob("*.md"))
    for plot in sorted((root / "benchmarks" / "results").glob("*.svg")):
        if RESULTS + plot.name in pages:
            uri = f"results/{plot.name}"
            files.append(File.generated(config, uri, abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lets links to plots point into the site."""
    return markdown.replace(f"]({RESULTS}", "](results/")
