"""s1's text and loss mask, spelled out: strings put together by hand, and a mask one token at a time."""

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def conversation_text(messages: list[dict[str, str]]) -> str:
    text = ""
    if messages[0]["role"] != "system":
        text += "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    for message in messages:
        text += "<|im_start|>" + message["role"] + "\n"
        text += message["content"] + "<|im_end|>\n"
    return text


def s1_text(question: str, trace: str, answer: str) -> str:
    if answer.find("Answer:") == -1:
        answer = "Answer: " + answer
    text = "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    text += "<|im_start|>user\n" + question + "<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    text += "<|im_start|>think\n" + trace.strip() + "\n"
    text += "<|im_start|>answer\n" + answer.strip()
    text += "<|im_end|>\n"
    return text


def loss_mask(input_ids: list[int], response: list[int], instruction: list[int]) -> list[bool]:
    """Reading from the left: a response marker just passed turns training on, an instruction marker off."""
    mask = []
    training = False
    for i in range(len(input_ids)):
        if input_ids[i : i + len(instruction)] == instruction:
            training = False
        elif i >= len(response) and input_ids[i - len(response) : i] == response:
            training = True
        mask.append(training)
    return mask
