"""Opens config.json for a server that is built on transformers, such as vLLM.

transformers has no class for the model type moss_audio. config.json's auto_map names this one, and
--trust-remote-code lets a server load it. moss-min reads config.json alone, and never runs this.
"""

from transformers import PretrainedConfig, Qwen3Config


class MossAudioConfig(PretrainedConfig):
    """config.json's values as they are, but for the decoder's, which servers read as Qwen3's."""

    model_type = "moss_audio"

    def __init__(self, language_config=None, **values):
        self.language_config = Qwen3Config(**language_config or {})
        super().__init__(**values)

    def get_text_config(self, *args, **kwargs) -> Qwen3Config:
        return self.language_config
