"""Every reason that is counted: why text or states were not reused or not kept, and the cure.

A reason is a short code: the key of a counter, the label of a metric, the end of a line in the log.
Each table here belongs to one counter. The page "Why is nothing reused?" of the documentation is
made from these tables, and a test finds every code of the source in them.
"""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """Why something was not reused or not kept, and what to do about it."""

    why: str
    cure: str


_NOTHING = "nothing to do"
_CALL = "call `token_ids`, or the method without that argument, where you can"

# CacheStats.bypasses: calls that the plain tokenizer answered.
BYPASSES = {
    "split_special_tokens": Reason("special tokens are to be encoded as text", _CALL),
    "stride": Reason("overflowing pieces with a stride were asked for", _CALL),
    "is_split_into_words": Reason("the text was split into words beforehand", _CALL),
    "return_overflowing_tokens": Reason("overflowing tokens were asked for", _CALL),
    "return_offsets_mapping": Reason(
        "offsets were asked for, which ids alone do not give",
        "leave out `return_offsets_mapping` where you do not use it",
    ),
    "sanitize_control_tokens": Reason("control tokens in the text are to be removed", _CALL),
    "other_argument": Reason("the call has an argument that tokcache does not know", _CALL),
    "input_type": Reason(
        "the input is neither a text, nor a list of texts or pairs", "pass str, or lists of str"
    ),
    "truncation": Reason(
        "tokenizers refuses this truncation, and raises its own error",
        "pass a `max_length` above the number of special tokens",
    ),
    "padding": Reason(
        "the padding's side, length or ids are not those that tokenizers takes",
        "pass positive ints, and set `pad_token`",
    ),
    "post_processor": Reason(
        "the post-processor is not a template that could be learnt", "call `token_ids`"
    ),
    "invalid_text": Reason(
        "an item is not a text that can be encoded; the plain tokenizer raises its error",
        "see its message",
    ),
    "encoding_objects": Reason(
        "an Encoding with offsets and words was asked for", "call `token_ids` for ids alone"
    ),
    "python_model": Reason(
        "the model is written in Python, and could change unnoticed",
        "use a model of tokenizers",
    ),
    "python_component": Reason(
        "a component is written in Python, so the tokenizer cannot be copied",
        "use components of tokenizers",
    ),
    "bpe_dropout": Reason(
        "BPE dropout gives one text several encodings", "set `dropout` to None for serving"
    ),
    "unigram_sampling": Reason(
        "sampling gives one text several encodings", "set `alpha` to None for serving"
    ),
    "empty_added_token": Reason(
        "an added token is empty once it is normalized, and tokenizers may search for it forever",
        "remove that added token",
    ),
    "copy_differs": Reason(
        "a copy of the tokenizer did not encode a probe like the original",
        "please report it, with the tokenizer",
    ),
    "normalizer_changed_in_place": Reason(
        "the normalizer was changed after added tokens were registered",
        "set the normalizer before adding tokens, or assign it again",
    ),
    "own_*": Reason(
        "a method of the tokenizer that decides ids was replaced by your own",
        "leave the tokenizer's methods as they are, or wrap before replacing",
    ),
}

# L0Stats.misses_by_reason, and those of chunks and segments in L1Stats: why a look-up missed.
TEXT_MISSES = {
    "new": Reason(
        "the cache never held it, or only before a clear or a change of the tokenizer", _NOTHING
    ),
    "evicted": Reason(
        "the cache held and evicted it",
        "raise `l0_max_entries` and `l0_max_bytes` (texts) or `l1_max_bytes` (chunks, segments)",
    ),
    "not_known": Reason(
        "the cache may have evicted it: it remembers about 4,096 evictions, and of"
        " texts above 16 KiB the length, the beginning and the end",
        "look at `evictions`: if they grow as fast as `insertions`, raise the budget",
    ),
}

# L0Stats.refusals: texts not put into L0.
L0_REFUSALS = {
    "oversize": Reason("the entry is larger than L0's whole budget", "raise `l0_max_bytes`"),
    "scopes": Reason("too many scopes are in use at once", "use fewer scopes"),
    "cleared": Reason("its scope was cleared while the text was encoded", _NOTHING),
}

# L1Stats.refusals: texts not cut, chunks and segments not kept.
L1_REFUSALS = {
    "post_processor": Reason(
        "the post-processor changes more than the beginning and end of a text",
        "pass `add_special_tokens=False`",
    ),
    "too_long": Reason("the text is too long for L1's offsets", "pass shorter texts"),
    "surrogate": Reason("the text has a lone surrogate", "decode input with errors='replace'"),
    "beside_single_word": Reason(
        "the text meets an added token with `single_word`, whose neighbours decide",
        "add the token without `single_word`",
    ),
    "no_cut": Reason(
        "there is no proven cut in a long stretch of text",
        "none for text such as base64; `tokcache explain` shows the cuts of your tokenizer",
    ),
    "oversize": Reason("a chunk does not fit the budget", "raise `l1_max_bytes`"),
    "memory": Reason("the system gave no memory", "lower the budgets, or add memory"),
    "cleared": Reason("its scope was cleared while the text was encoded", _NOTHING),
    "segments_differ": Reason(
        "missing segments, encoded together, could not be told apart; the text was encoded whole",
        "please report it if it is frequent, with the tokenizer",
    ),
    "verified": Reason("an answer was encoded again as `verify_rate` asks: no refusal", _NOTHING),
    "differences": Reason(
        "`verify_rate` found an answer that differs from the tokenizer's; the log says what is off",
        "please report it, with the tokenizer",
    ),
    "engine_dropped": Reason(
        "the faster encoder failed or differed, and tokenizers encodes from then on",
        'see the log; choose `engine="tokenizers"`',
    ),
}

# CacheStats.engine_reason: why the engine in force encodes, and no faster one.
ENGINE_REASONS = {
    "pending": Reason(
        "the proof of a faster engine has not ended, and tokenizers encodes until then",
        "`wait_for_engine()` waits for it",
    ),
    "proven": Reason("the engine proved equal to the tokenizer in this process", _NOTHING),
    "remembered": Reason(
        "the engine proved equal in an earlier process, and on a sample of the probes in this one",
        _NOTHING,
    ),
    "configured": Reason('`engine="tokenizers"` was configured', 'choose `engine="auto"`'),
    "not_installed": Reason("no faster engine is installed", "pip install 'tokcache[engines]'"),
    "refused": Reason(
        "no installed engine is equal to the tokenizer", "`tokcache explain` says why"
    ),
    "failed": Reason("the proof ended with an error", "see the log, and please report it"),
    "dropped": Reason(
        "the faster engine failed or gave other ids, and tokenizers encodes from then on",
        "see the log",
    ),
    "forked": Reason(
        "the process was forked, and the engine's threads exist only in the parent",
        "wrap the tokenizer after the fork",
    ),
    "difference": Reason(
        "`verify_rate` found a difference, and no text is put together from segments any more",
        "please report it, with the tokenizer",
    ),
    "not_cut": Reason(
        "no text of this tokenizer is cut, and tokenizers encodes whole texts",
        "`tokcache explain` says why",
    ),
    "no_l1": Reason("`l1=False` was configured, and tokenizers encodes", "choose `l1=True`"),
    "not_cached": Reason(
        "the tokenizer's answers are not cached, and it encodes itself",
        "`tokcache explain` says why",
    ),
}

# SignedRecords.refusals: why a model file was hashed, or an engine proven, again.
RECORD_REFUSALS = {
    "unreadable": Reason("the record can't be read", "check the cache folder"),
    "damaged": Reason("the record is damaged", "check the cache folder"),
    "unwritable": Reason("the record can't be written", "check the cache folder"),
    "no_folder": Reason("there is no cache folder", "set TOKCACHE_CACHE_DIR"),
    "no_key": Reason("the key of the cache folder can't be read", "check its permissions"),
    "damaged_key": Reason("the key of the cache folder is damaged", "remove it"),
}

# CutPlan.off, shown by `tokcache explain`: why no text of a tokenizer is cut.
L1_OFF = {
    "added_tokens_overlap": Reason(
        "added tokens of both kinds (normalized or not) overlap, or one takes another's whitespace",
        "rename the token, or add it without lstrip and rstrip",
    ),
    "normalized_tokens_alike": Reason(
        "two added tokens are the same text once they are normalized",
        "remove one, or add them with `normalized=False`",
    ),
    "long_added_token": Reason(
        "an added token is longer than 256 characters", "use a shorter added token"
    ),
    "no_separator": Reason(
        "added tokens hold every character with which a separator could begin",
        "remove added tokens",
    ),
    "post_processor": Reason(
        "the post-processor is not one that adds the same tokens to every text",
        "use a template post-processor",
    ),
}

# RenderStats.refusals: chats that transformers rendered, and texts not kept.
RENDER_REFUSALS = {
    "new_template": Reason(
        "the template was used for the first time; it is prepared at the second", _NOTHING
    ),
    "continue_final_message": Reason("the last message is to be continued", _NOTHING),
    "return_assistant_tokens_mask": Reason(
        "the mask of the assistant's tokens was asked", _NOTHING
    ),
    "sanitize_control_tokens": Reason("control tokens in the text are to be removed", _NOTHING),
    "type": Reason(
        "the messages, tools or variables hold something else than dict, list, str, numbers, bool "
        "and None, or are several chats at once",
        "pass one chat, of plain types (`model_dump()` of objects)",
    ),
    "no_loop": Reason(
        "the template has no loop over the messages, or has it inside a condition", _NOTHING
    ),
    "loop_form": Reason(
        "the loop over the messages has a condition, `else` or recursion", _NOTHING
    ),
    "statement": Reason("the template has a statement that is not known", _NOTHING),
    "macro": Reason("the template defines macros in another place than at its top", _NOTHING),
    "name": Reason("the template uses a name in a way that cannot be taken apart", _NOTHING),
    "unsteady": Reason(
        "the template uses something that differs between renderings, such as `random`", _NOTHING
    ),
    "unusual": Reason(
        "the template uses all messages as one value, or keeps something else than data", _NOTHING
    ),
    "failed": Reason(
        "the template raised an error; transformers rendered the chat, and raised its own if the "
        "chat is not one for this template",
        "see the error",
    ),
    "transformers": Reason(
        "this version of transformers prepares chats in another way", "use a newer transformers"
    ),
    "no_gain": Reason(
        "the template reads all messages before its loop, with other results for nearly every chat",
        _NOTHING,
    ),
    "oversize": Reason("a text does not fit the budget", "raise `render_max_bytes`"),
    "cleared": Reason("its scope was cleared, or the chat evicted, meanwhile", _NOTHING),
    "verified": Reason(
        "an answer was rendered again, as `verify_rate` asks, or among the first of a template: no "
        "refusal",
        _NOTHING,
    ),
    "differences": Reason(
        "a text differed from that of transformers, which renders all chats from then on",
        "please report it, with the chat template",
    ),
}

# StateStats.refusals: states not stored or not used.
STATE_REFUSALS = {
    "over_budget": Reason("the state is larger than `ram_bytes`", "raise `ram_bytes`"),
    "blocks_in_use": Reason(
        "all blocks that could be evicted are in use", "raise `ram_bytes`, or close handles"
    ),
    "entries_in_use": Reason(
        "`max_entries` is reached, and all entries are in use or pinned",
        "raise `max_entries`, or unpin",
    ),
    "no_memory": Reason("the system gave no memory", "lower `ram_bytes`, or add memory"),
    "payload_lost": Reason(
        "the index names a state whose bytes are gone", "please report it if it is frequent"
    ),
    "save_failed": Reason("the engine could not export the state", "see the log of the engine"),
    "restore_failed": Reason(
        "the engine did not accept a state; the prompt was decoded", "see the log of the engine"
    ),
    "cleared": Reason("its scope was cleared meanwhile", _NOTHING),
    "not_worth_writing": Reason(
        "by the reads measured so far a tier would give the states back slower than the engine "
        "computes them, so they were not written there (counted with its name, as "
        "`disk: not_worth_writing`)",
        "use a faster disk or network",
    ),
    "queue_full": Reason(
        "a tier is slower than states are saved (counted with its name, as `disk: queue_full`)",
        "raise `queue_bytes`, or use a faster tier",
    ),
}

# Prompts with `splice=True`: the first reason for which an answer kept the ids of its text.
# `last_reuse.splice_refusal` and `Reused.splice_refusal` have them, and the counters below.
SPLICE_REFUSALS = {
    "splice_no_answer": Reason(
        "no remembered answer of the scope begins where the prompt's ids agree up to its start: a "
        "new chat, one that was changed before the answer, or an answer that was forgotten",
        _NOTHING,
    ),
    "splice_other_text": Reason(
        "the prompt has another text in the place of the answer",
        "send answers back as they were generated",
    ),
    "splice_trimmed": Reason(
        "the prompt has a part of the answer: it was trimmed, or a stop text ended it",
        "use a chat template that keeps answers as they are, and the model's own end token",
    ),
    "splice_partial_character": Reason(
        "the answer ended within a character, or its bytes are not known exactly",
        "raise the limit of tokens",
    ),
    "splice_added_token": Reason(
        "the model generated a control token or an added one inside the answer", _NOTHING
    ),
    "splice_no_added_token_follows": Reason(
        "the answer's text is not followed at once by an added token, so that its last ids may "
        "depend on the text after it",
        "use a chat template that ends answers with an added token",
    ),
    "splice_call_form": Reason(
        "`echo`, `logprobs` and `suffix` need the prompt's own text",
        "leave them out of calls of a chat",
    ),
}

# The same counter, of `tokcache.llama.Llama` and `SequenceStates`; llama/reasons.py has those that
# keep a model from being cached at all.
LLAMA_REFUSALS = {
    "fingerprint_pending": Reason(
        "the model file is still being hashed", "call `llm.wait_for_fingerprint()` at start"
    ),
    "fingerprint_failed": Reason(
        "the model file cannot be read any more", "keep the file in its place while it is used"
    ),
    "model_file_changed": Reason(
        "the model file was changed while it was loaded", "rename new files over old ones"
    ),
    "openers_unknown": Reason(
        "the messages of the model's chat template do not open with added tokens, or it could not "
        "render a short chat; states of recurrent memories are saved on the grid only",
        "pass `message_openers=`",
    ),
    "prewarm_chat_handler": Reason(
        "a chat was to be warmed, and the model has a chat handler of your own, which may fill the "
        "context itself",
        "warm the text or the ids",
    ),
    "prewarm_duplicate": Reason("a prefix was given twice to `prewarm`", _NOTHING),
    "prewarm_empty": Reason(
        "a prefix has no token, or, in reproducible mode, fewer than `block_tokens`",
        "leave the prefix out",
    ),
    "prewarm_not_kept": Reason(
        "memory has no room for all the states of a prefix that was prefilled",
        "raise `ram_bytes` and `max_entries`, or warm fewer prefixes",
    ),
    "prewarm_not_written": Reason(
        "a tier below memory did not take all the states of a prefix; its own reason is counted",
        "look up that reason: the disk is full, for example",
    ),
    "prewarm_other_model": Reason(
        "a prefix has ids that are not in the model's vocabulary, or a file for "
        "`tokcache states warm` is for another model",
        "encode the prefix with the model's tokenizer",
    ),
    "prewarm_template_failed": Reason(
        "the chat template can't render the chat with a question after it",
        "warm a chat that the template takes, or the text or ids",
    ),
    "prewarm_too_long": Reason(
        "a prefix leaves no room in the context for a question", "raise `n_ctx`"
    ),
    "unknown_positions": Reason(
        "the context holds positions that no known token wrote, such as an image", _NOTHING
    ),
    "snapshot_failed": Reason(
        "llama.cpp could not copy the state of a suspended generation", "see llama.cpp's log"
    ),
    "memory_of_unknown_behaviour": Reason(
        "the model's memory does not behave like others of its kind in this build of llama.cpp",
        "use another version of llama-cpp-python, or leave out `prefix_cache`",
    ),
    "restore_incomplete": Reason(
        "after a restore the sequence was not at the position it should be at, and was cleared",
        "see llama.cpp's log",
    ),
    "tail_without_blocks": Reason(
        "the state at a prompt's end was found, but not the attention blocks before it",
        "raise `ram_bytes`: the blocks were evicted",
    ),
    "sequence_is_elsewhere": Reason(
        "the sequence holds other positions than its record says",
        "call `reset` after you change a sequence yourself",
    ),
    "fork_of_the_past": Reason(
        "a recurrent memory holds only its present state, and a fork of fewer tokens was asked for",
        "fork when the source has just reached the end of the common tokens",
    ),
    "fork_outside_window": Reason(
        "the window has dropped positions that the next token of the branches looks back at",
        "fork before the source is decoded further, or make the context with swa_full=True",
    ),
    "pending_save_overtaken": Reason(
        "the sequence went on before the fingerprint was known", "wait for the fingerprint first"
    ),
    "tokens_outside_the_vocabulary": Reason(
        "tokens are not in the model's vocabulary", "encode with the model's own tokenizer"
    ),
    **SPLICE_REFUSALS,
}

# TierStats.refusals, and StateStats.refusals as "disk: reason" and "redis: reason".
TIER_REFUSALS = {
    "slower_than_prefill": Reason(
        "reading the state took longer than computing it", "use a faster disk or network"
    ),
    "no_room": Reason("memory had no room for a state that was found", "raise `ram_bytes`"),
    "error": Reason("the tier failed in an unexpected way", "see the log"),
    "damaged": Reason("a checksum does not match; the file was removed", "check the disk"),
    "forged": Reason(
        "the MAC does not match: written without the key, or changed",
        "give all writers the same `hmac_key`; find out who else writes there",
    ),
    "other_keys": Reason("written with another key, or without one", "give all the same keys"),
    "other_version": Reason("written by another version of tokcache", _NOTHING),
    "misfiled": Reason(
        "the state names another place than the one it was found at",
        "find out who moves files, or writes there",
    ),
    "too_large_to_encrypt": Reason(
        "one AES-GCM message holds at most 2 GiB", "lower `block_tokens`"
    ),
    "over_budget": Reason(
        "the state is larger than the tier takes", "raise `max_bytes` or `max_state_bytes`"
    ),
    "place_taken": Reason("other states already have both places of this name", _NOTHING),
    "expired": Reason("the state was not used for `ttl_s` seconds", "raise `ttl_s`"),
    "closed": Reason("the tier was closed", "close it after the caches that use it"),
    "no_memory": Reason("the system gave no memory", "lower the budgets, or add memory"),
    "full": Reason("the disk or Redis is full", "free space, or set a budget below it"),
    "permission": Reason(
        "the process may not read or write there",
        "give it the folder, or the Redis user the commands that the log names",
    ),
    "symlink": Reason("a symbolic link stands where a folder or file should be", "remove it"),
    "missing": Reason("the folder or state was removed meanwhile", "leave the folder alone"),
    "no_file": Reason("something that is not a regular file has the state's name", "remove it"),
    "other_user": Reason("the file belongs to another user", "run all processes as one user"),
    "circuit_open": Reason(
        "Redis failed several times in a row and is left alone for a while", "see the log"
    ),
    "writes_paused": Reason("writes to Redis failed and are paused for a while", "see the log"),
    "overtaken": Reason("another process changed the state while it was read", _NOTHING),
    "removed": Reason("the state was removed while it was written", _NOTHING),
    "garbage": Reason("the answer was not one of a Redis", "check the URL"),
    "wrong_type": Reason("a key of the namespace has another type", "use a namespace of its own"),
    "timeout": Reason("Redis did not answer within `timeout_s`", "raise it, or check the network"),
    "unreachable": Reason("no connection to Redis", "check the URL and the network"),
    "auth": Reason("Redis rejected user or password", "put the right ones into the URL"),
    "loading": Reason("Redis is loading its data", "wait"),
    "read_only": Reason("this Redis is a replica", "use the URL of the primary"),
    "not_persisting": Reason("Redis refuses writes: it cannot save to its disk", "see its log"),
    "no_replicas": Reason("Redis refuses writes: too few replicas", "see its configuration"),
    "cluster_down": Reason("the cluster does not serve all slots", "see `CLUSTER INFO`"),
    "moved": Reason("the cluster is moving slots", "wait, or pass `is_cluster=True`"),
    "busy": Reason("a script blocks Redis", "see `SLOWLOG`"),
    "server_error": Reason("Redis refused a command", "see the log"),
}

# ReuseStats.refusals of LlamaServer; llama/server/trust.py has those that are logged with a cure.
SERVER_REFUSALS = {
    "cleared": Reason("its scope was cleared meanwhile", _NOTHING),
    "restore_not_used_by_server": Reason(
        "the server decoded a restored slot again",
        "start llama-server with its default `--ctx-checkpoints`",
    ),
    "settling_failed": Reason(
        "saving or emptying a slot after an answer failed", "see the log at level DEBUG"
    ),
    "files_of_another_model": Reason("the server was started with another model", _NOTHING),
    "server_away": Reason("the server did not answer", "see the log"),
    "server_restarted": Reason(
        "the server was started again, and no file had the contents of its slots",
        "set `--slot-save-path`, and leave `save_when` at `answered`",
    ),
    "slot_busy": Reason(
        "a slot that was decoding for another request held more of the prompt",
        "start the server with more slots, or send the requests of a conversation in turn",
    ),
    "cut_off": Reason(
        "a request was cut off before its answer began, so its slot was emptied",
        "leave `save_when` at `answered`, so that a file has the contents",
    ),
    "context_shifted": Reason(
        "the prompt and its answer did not fit into a slot, so the server dropped some tokens",
        "start the server with more context",
    ),
    "explanation_failed": Reason(
        "the server did not give the texts that `explain` asked for; the answer has none",
        "see the server's log",
    ),
    "no_checkpoint": Reason(
        "a slot or file held more of the prompt, but the server cannot go back to that place",
        "start llama-server with its default `--ctx-checkpoints`; in reproducible mode only whole "
        "files are restored",
    ),
    **{code: each for code, each in SPLICE_REFUSALS.items() if code != "splice_call_form"},
}

# `remembered_digests`: why the digest of a model file was computed again.
DIGEST_REFUSALS = {
    "blocks_differ": Reason("the file was changed although its times were not", _NOTHING),
    **RECORD_REFUSALS,
}

# Counters of `tokcache serve`, and the `detail` of a reason in its answers.
GATEWAY_REASONS = {
    "busy": Reason(
        "a busy slot was decoding the prefix and was not free in time",
        "start the llama-server with more slots",
    ),
    "queue_full": Reason(
        "more requests waited than `max_queue`", "raise it, or start more llama-servers"
    ),
    "queue_timeout": Reason(
        "no slot became free within `queue_timeout_s`", "raise it, or start more llama-servers"
    ),
    "model_name_taken": Reason(
        "a llama-server started with another model under the name of one that is served",
        "start it with another `--alias`",
    ),
    "file_gone": Reason(
        "a saved file was deleted or truncated", "leave the slot folder to the gateway"
    ),
    "restore_failed": Reason(
        "the llama-server refused a saved file",
        "see its log; its settings may have changed since the file was saved",
    ),
    "different_ids": Reason(
        "a saved file has the request's messages, but their rendering has other token ids, so it"
        " was not restored",
        "use a chat template that only appends; `tokcache explain --chat` names its switches",
    ),
    "prompt_ids_unknown": Reason(
        "the llama-server did not render a prompt, or counted another number of tokens than the"
        " tokenizer, so its ids were not compared",
        _NOTHING,
    ),
    "restore_not_used_by_server": Reason(
        "the llama-server used less than half of a restored file",
        "start it with `--ctx-checkpoints 32`; after three in a row no more are restored",
    ),
    "slot_changed_by_others": Reason(
        "a slot held other tokens than recorded",
        "let nobody else use the llama-server",
    ),
    "save_failed": Reason("the llama-server could not save a slot", "see its log"),
    "cut_off": Reason(
        "a request was cut off while its slot was prepared, so the slot's contents were lost",
        _NOTHING,
    ),
    "server_away": Reason("the llama-server did not answer, so its slots are lost", "see its log"),
    "server_restarted": Reason(
        "the llama-server was started again, and no file had the contents of its slots",
        "stop the gateway first: it saves the slots",
    ),
    "file_over_budget": Reason("a saved slot is larger than `max_bytes`", "raise `max_bytes`"),
    "file_not_deleted": Reason(
        "a saved file could not be deleted", "let the gateway write to the slot folder"
    ),
    "files_of_another_model": Reason(
        "the model gave other probabilities after a fixed prompt, so its files were dropped",
        _NOTHING,
    ),
    "disk_unreadable": Reason(
        "the size of the disk could not be read again, and its last size stays the budget's",
        "look at the disk of the slot folder, or give `max_bytes` in bytes",
    ),
    "list_damaged": Reason("the list of saved files can't be read", "delete `files.json`"),
    "list_of_other_format": Reason(
        "the list of saved files is of another version of tokcache, so they are not found", _NOTHING
    ),
    "tokenizer_pending": Reason(
        "the llama-server counted tokens while the model's tokenizer was still being proven equal",
        _NOTHING,
    ),
    "tokenizer_not_given": Reason(
        "the llama-server counted tokens: no tokenizer is known for it",
        "set `tokenizer` of the upstream to its model's GGUF or tokenizer.json",
    ),
    "tokenizer_unreadable": Reason(
        "the llama-server counted tokens: the model's tokenizer could not be read",
        "see the log; set `tokenizer` to the model's own tokenizer.json",
    ),
    "tokenizer_differs": Reason(
        "the llama-server counted tokens: it gave other ids than the tokenizer for a probe",
        "see the log; set `tokenizer` to that of the model that the llama-server has",
    ),
    "tokenize_form": Reason(
        "the request to /tokenize had `parse_special` off or a content that is not one text",
        "send one text, with `parse_special` on, where you can",
    ),
    "volatile_*": Reason(
        "the system prompt holds a nonce or a clock", "switch on the rule of that name in `rules`"
    ),
}

# StateStats.misses, Miss.reason (tokcache.MissReason): why a prompt was reused no further.
MISSES = {
    "different_text": Reason(
        "the nearest held prefix of the scope goes on with other tokens",
        "look for parts that change with each request (a date, an id, the order of tools), and put "
        "them at the end; `tokcache why` compares two requests",
    ),
    "template": Reason(
        "the chat template rendered an earlier turn in another way than before",
        "`tokcache explain --chat` shows which turns, and the switch that cures it",
    ),
    "re_encoding": Reason(
        "the ids that the model generated are not those of their text encoded again",
        "pass `splice=True`, or continue with the ids, not with the text; otherwise the answer's "
        "end is decoded again",
    ),
    "evicted": Reason(
        "this process held the state and evicted it; the detail names tiers and budget",
        "raise that budget, or add a tier below memory",
    ),
    "expired": Reason("the state was not used for `ttl_s` seconds", "raise `ttl_s`"),
    "damaged": Reason(
        "a tier had the state, but its bytes were not those that were stored",
        "check the disk; find out who else writes there",
    ),
    "slower_than_prefill": Reason(
        "a tier was not asked, because reading from it takes longer than computing",
        "use a faster disk or network",
    ),
    "refused": Reason(
        "the state could not be stored or used; the detail is the code of a refusal, or "
        "`below_minimum`, `save_skipped` (such prompts seldom came back), `disabled`, `closed`",
        "look up the code in the other tables",
    ),
    "other_fingerprint": Reason(
        "the scope has the prompt's beginning for another model file, adapter, setting or build; "
        "the detail names the parts that differ",
        "use the same model and settings, or warm up the new one",
    ),
    "never_stored": Reason(
        "this process never held more of the prompt in this scope, and no tier has more", _NOTHING
    ),
    "not_known": Reason(
        "so many states of this scope were removed that the oldest removals are forgotten",
        "look at `evictions` and `expirations`",
    ),
}

TABLES = {
    "Prompts not reused to their end": MISSES,
    "Calls answered by the plain tokenizer": BYPASSES,
    "Texts, chunks and segments not found in L0 and L1": TEXT_MISSES,
    "Texts not put into L0": L0_REFUSALS,
    "Texts not cut, chunks not kept (L1)": L1_REFUSALS,
    "The engine in force": ENGINE_REASONS,
    "Tokenizers whose texts are never cut": L1_OFF,
    "Chats rendered in full": RENDER_REFUSALS,
    "States not stored or not used": STATE_REFUSALS,
    "llama.cpp in process": LLAMA_REFUSALS,
    "Disk and Redis": TIER_REFUSALS,
    "llama-server": SERVER_REFUSALS,
    "Digests of model files, and proofs of engines": DIGEST_REFUSALS,
    "The endpoint `tokcache serve`": GATEWAY_REASONS,
}
