"""`attnctrl demo --mcp`: the endpoints as tools of the Model Context Protocol."""

import asyncio
import base64
import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from attnctrl import AttnCtrlError
from attnctrl.apps.demo.limits import admit

from .conftest import serving


pytest.importorskip("gradio", reason="the page needs gradio")
ASKED = {"prompt": "a red cat", "steps": 2, "seed": 3}


def asked_of(address, work):
    """What `work(session)` returns of a session with the tools."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def talk():
        connecting = streamablehttp_client(f"{address}gradio_api/mcp/")
        async with connecting as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return await work(session)

    with ThreadPoolExecutor(1) as own:  # a thread without an event loop of its own
        return own.submit(asyncio.run, talk()).result(120)


def test_endpoints_are_tools_with_typed_arguments(model, vlm):
    pytest.importorskip("mcp.server.lowlevel.helper_types", reason="tools need the package mcp, below version 2")
    jsonschema = pytest.importorskip("jsonschema", reason="mcp needs it")

    async def work(session):
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        made = await session.call_tool("generate", {**ASKED, "controls": ["SoftPAG(heads='1.2')"]})
        refused = await session.call_tool("generate", {"prompt": "a cat", "regions": ["a cat@/etc/passwd"]})
        return tools, made, refused

    with serving(model, mcp=True, vlm=vlm) as (address, studio):
        tools, made, refused = asked_of(address, work)
        visitor, asked = studio.visitor("test"), admit({**ASKED, "controls": ["SoftPAG(heads='1.2')"]})
        *_, wanted = studio.draw([("picture", asked)], visitor.folder, visitor.begin())
    assert set(tools) == {"generate", "describe", "ask"}
    assert tools["generate"].description.startswith("Draws one picture")
    for tool in tools.values():
        jsonschema.Draft202012Validator.check_schema(tool.inputSchema)
    arguments = tools["generate"].inputSchema["properties"]
    assert arguments["prompt"]["type"] == "string" and "what to draw" in arguments["prompt"]["description"]
    assert arguments["steps"]["type"] == "integer" and "request" not in arguments
    assert arguments["regions"]["type"] == arguments["controls"]["type"] == "array"
    assert not made.isError, made.content
    (picture,) = [part for part in made.content if part.type == "image"]
    with Image.open(io.BytesIO(base64.b64decode(picture.data))) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(wanted.image.convert("RGB")))
    assert refused.isError and "files are not read here" in refused.content[0].text


def test_tools_that_cannot_be_served_are_an_error(model, monkeypatch):
    """What gradio says of an `mcp` that it cannot use, it keeps to itself; version 2 of `mcp` is one."""

    class Unusable:
        def __init__(self, blocks):
            raise AttributeError("'Server' object has no attribute 'call_tool'")

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *given: name == "mcp" or find(name, *given))
    monkeypatch.setattr("gradio.mcp.GradioMCPServer", Unusable)
    with pytest.raises(AttnCtrlError, match=r"--mcp: .*no attribute 'call_tool'\nHINT: pip install 'mcp<2'"):
        with serving(model, mcp=True):
            raise AssertionError("it was served")
