"""What is printed when the mesh answers."""

import json
from collections.abc import Mapping

from gpumesh_local.home import Home


def how_to_use(client: Mapping[str, str], home: Home, *, detached: bool) -> str:
    """URL, key, a curl and a Python snippet that work as they are, where the logs are, how it ends."""
    body = json.dumps({"model": client["model"], "messages": [{"role": "user", "content": "Hello!"}]})
    end = "`make down` (or `gpumesh down`) ends it." if detached else "Ctrl-C (or `make down`) ends it."
    return f"""
gpumesh is ready.

  URL      {client["base_url"]}
  API key  {client["api_key"]}
  model    {client["model"]}
  logs     {home.logs}
  client   {home.client_file}

Try it:

  curl {client["base_url"]}/chat/completions \\
    -H "Authorization: Bearer {client["api_key"]}" \\
    -H "Content-Type: application/json" \\
    -d '{body}'

or, after `pip install openai`:

  from openai import OpenAI
  client = OpenAI(base_url="{client["base_url"]}", api_key="{client["api_key"]}")
  answer = client.chat.completions.create(
      model="{client["model"]}", messages=[{{"role": "user", "content": "Hello!"}}]
  )
  print(answer.choices[0].message.content)

{end}
"""
