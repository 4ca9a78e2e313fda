"""YAML as people write it by hand: plain values, and no key twice, since the second would silently
take the place of the first."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Also looks at the keys of a mapping before they are merged."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands there a second time; put both parts under one",
                    problem_mark=key_node.start_mark,
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value that a text holds. yaml.YAMLError when it is no YAML, or gives a key twice."""
    return yaml.load(text, _Loader)
