"""A command of the ``msp`` command line."""

from msp_plugin import hookimpl


@hookimpl
def msp_register_commands(app):
    @app.command("hello")
    def hello(name: str = "world"):
        print(f"hello {name}")
