"""LangChain's standard suites for tools, offline."""

import pytest
from langchain_tests.integration_tests import ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests

from langchain_cogview import CogViewImageTool


class TestToolUnit(ToolsUnitTests):
    @property
    def tool_constructor(self):
        return CogViewImageTool

    @property
    def tool_constructor_params(self):
        return {"base_url": "sandbox:", "output_dir": "cogview_images"}

    @property
    def tool_invoke_params_example(self):
        return {"prompt": "a cute little kitten", "size": "1024x1024", "quality": "standard"}

    @property
    def init_from_env_params(self):
        return {"COGVIEW_BASE_URL": "sandbox:"}, {}, {"name": "cogview_generate_image"}


class TestToolIntegration(ToolsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _in_an_empty_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @property
    def tool_constructor(self):
        return CogViewImageTool

    @property
    def tool_constructor_params(self):
        return {"base_url": "sandbox:"}

    @property
    def tool_invoke_params_example(self):
        return {"prompt": "a cute little kitten"}
