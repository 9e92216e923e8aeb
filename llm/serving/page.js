// What the page does by itself: chats kept in this browser, copied and edited as they were written, exported.
// Gradio's parts are found by the names that people see too (aria-label), and by the ids of browser.py.
(() => {
  const KEY = "fathom.chats";
  const CURRENT = "fathom.chat"; // in sessionStorage: the chat of this tab, also after a reload
  const MOST = 50;
  const MOST_TYPED = 8_000; // MAX_MESSAGE of talk.py
  const MOST_SENT = 1_000_000; // bytes; the server takes a little more (MAX_BODY of guard.py)
  const MOST_CHARACTERS = 2_000_000; // of all chats; a browser gives 5 MB
  let data = null; // {id, chat} as the server last told it

  const element = (id) => document.getElementById(id);
  const chats = () => {
    try {
      return JSON.parse(localStorage.getItem(KEY)) ?? [];
    } catch {
      return [];
    }
  };

  function keep(list) {
    try {
      let text = JSON.stringify(list.slice(0, MOST));
      for (let n = Math.min(list.length, MOST); n > 1 && text.length > MOST_CHARACTERS; n--) {
        text = JSON.stringify(list.slice(0, n - 1));
      }
      localStorage.setItem(KEY, text);
    } catch {
      // no room, or storage is turned off: the chat goes on without
    }
    showList();
  }

  const text = (content) => {
    if (typeof content === "string") return content;
    let shown = "";
    content.forEach((part, i) => {
      const joins = part.type === "python_output" && content[i - 1]?.type === "python";
      if (part.type === "text") shown += part.text;
      else shown = joins ? `${shown.slice(0, -1)} = ${part.text}]` : `${shown}[${part.text}]`;
    });
    return shown;
  };

  const title = (chat) => {
    const first = chat.threads[0].messages[0];
    return first ? text(first.content).replace(/\s+/g, " ").trim().slice(0, 60) : "";
  };

  // The server tells the chat after every answer, and once when the page is ready: then the chat of before a reload is
  // taken up again.
  function take(json) {
    const isFirst = data === null;
    try {
      data = JSON.parse(json);
      const before = sessionStorage.getItem(CURRENT);
      if (isFirst && chats().some((one) => one.id === before)) return open(before);
      sessionStorage.setItem(CURRENT, data.id);
    } catch {
      if (data === null) return; // else storage is turned off
    }
    // Gradio names every message by its Markdown source, with our escapes in it; its text is a better name.
    for (const shown of document.querySelectorAll(".chat [data-testid][aria-label]")) shown.removeAttribute("aria-label");
    const others = chats().filter((one) => one.id !== data.id);
    keep(title(data.chat) ? [{ id: data.id, chat: data.chat, time: Date.now() }, ...others] : others);
  }

  // A chat goes to the server as the text of a hidden box; where there is none of this id, a new one begins.
  function open(id) {
    const found = chats().find((one) => one.id === id);
    const content = JSON.stringify(found ? { id: found.id, chat: found.chat } : { time: Date.now() });
    if (new Blob([content]).size > MOST_SENT) return alert("This chat has become too long to be taken up again.");
    const box = element("fathom-stored").querySelector("textarea");
    box.value = content;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function make(name, properties, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  function showList() {
    const place = element("fathom-chats");
    if (!place) return;
    const entries = chats().map((one) => {
      const name = title(one.chat);
      const current = one.id === data?.id;
      const pick = make("button", { className: "pick", title: name, onclick: () => open(one.id) }, name);
      if (current) pick.setAttribute("aria-current", "true");
      const remove = make("button", { className: "remove", title: "Delete" }, "\u00d7");
      remove.setAttribute("aria-label", `Delete chat: ${name}`);
      remove.onclick = () => {
        keep(chats().filter((other) => other.id !== one.id));
        if (current) open(null);
        (place.querySelector("button") ?? element("fathom-new")).focus();
      };
      return make("li", {}, pick, remove);
    });
    place.querySelector("ul")?.remove();
    if (entries.length) place.append(make("ul", {}, ...entries));
  }

  function download(name, type, content) {
    const url = URL.createObjectURL(new Blob([content], { type }));
    make("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  const asText = (chat) =>
    chat.threads
      .map(({ model, messages }) => {
        const system = chat.system ? `System: ${chat.system}\n\n` : "";
        const lines = messages.map((m) => `${m.role === "user" ? "You" : model}: ${text(m.content)}\n\n`);
        return `# ${model}\n\n${system}${lines.join("")}`;
      })
      .join("\n");

  const actions = {
    "fathom-new": () => open(null),
    "fathom-json": () => data && download("chat.json", "application/json", `${JSON.stringify(data.chat, null, 2)}\n`),
    "fathom-text": () => data && download("chat.txt", "text/plain", asText(data.chat)),
  };

  async function copy(content) {
    try {
      await navigator.clipboard.writeText(content);
    } catch {
      const box = make("textarea", { value: content, style: "position: fixed; opacity: 0" }); // not a secure context
      document.body.append(box);
      box.select();
      document.execCommand("copy");
      box.remove();
    }
  }

  // The message that a button below it belongs to: its row, and what the server says is in it.
  function messageOf(button) {
    const chat = button.closest("#fathom-chat-0, #fathom-chat-1");
    const rows = [...chat.querySelectorAll(".message-row")];
    const before = (row) => row.compareDocumentPosition(button) & Node.DOCUMENT_POSITION_FOLLOWING;
    const index = rows.filter(before).length - 1;
    const message = data?.chat.threads[Number(chat.id.slice(-1))]?.messages[index];
    return { row: rows[index], content: message && text(message.content) };
  }

  document.addEventListener(
    "click",
    (event) => {
      const button = event.target.closest?.("button");
      if (!button) return;
      const action = actions[button.id];
      const label = button.getAttribute("aria-label");
      if (action) action();
      else if (!button.closest("#fathom-chat-0, #fathom-chat-1")) return;
      else if (label === "Copy message") {
        event.stopImmediatePropagation(); // Gradio would copy what it renders, with our escapes in it
        const { row, content } = messageOf(button);
        copy(content ?? row.querySelector(".prose").innerText);
        button.classList.add("copied");
        setTimeout(() => button.classList.remove("copied"), 1500);
      } else if (label === "Edit") {
        const { row, content } = messageOf(button);
        const fill = (tries) => {
          const box = row.querySelector("textarea.edit-textarea");
          if (!box && tries) return requestAnimationFrame(() => fill(tries - 1));
          if (!box || content === undefined) return;
          box.value = content;
          box.dispatchEvent(new Event("input", { bubbles: true }));
          box.setAttribute("aria-label", "Edit message");
          box.focus();
        };
        requestAnimationFrame(() => fill(60));
      }
    },
    true,
  );

  // Typing anywhere goes into the message box, without taking the focus from whoever uses the Tab key.
  document.addEventListener("keydown", (event) => {
    const idle = document.activeElement === document.body || !document.activeElement;
    if (idle && event.key.length === 1 && event.key !== " " && !event.ctrlKey && !event.metaKey && !event.altKey) {
      element("fathom-question")?.querySelector("textarea")?.focus();
    }
  });

  // A message that is too long is said so where it was typed or pasted. It stays as it is, and is not sent.
  const typed = (event) => event.target.closest?.("#fathom-question")?.querySelector("textarea");
  const isTooLong = (box) => box && box.value.length > MOST_TYPED;

  document.addEventListener("input", (event) => {
    const box = typed(event);
    if (!box) return;
    const hint = element("fathom-length") ?? make("div", { id: "fathom-length", role: "status" });
    if (!hint.parentElement) element("fathom-question").prepend(hint);
    const [length, most] = [box.value.length, MOST_TYPED].map((n) => n.toLocaleString("en"));
    hint.textContent = isTooLong(box) ? `The message has ${length} characters, ${most} are possible.` : "";
  });

  function holdBack(event) {
    if (!isTooLong(typed(event))) return;
    event.preventDefault();
    event.stopImmediatePropagation();
  }

  const isSend = (event) => event.target.closest?.(".submit-button") !== null;
  document.addEventListener("click", (event) => isSend(event) && holdBack(event), true);
  for (const kind of ["keydown", "keypress"]) {
    document.addEventListener(kind, (event) => event.key === "Enter" && !event.shiftKey && holdBack(event), true);
  }

  function start() {
    const told = element("fathom-data");
    const stored = element("fathom-stored")?.querySelector("textarea");
    if (!told || !stored || !element("fathom-chats")) return false;
    new MutationObserver(() => told.textContent.trim() && take(told.textContent)).observe(told, {
      childList: true,
      characterData: true,
      subtree: true,
    });
    window.addEventListener("storage", (event) => event.key === KEY && showList()); // another tab wrote
    showList();
    return true;
  }

  const waiting = new MutationObserver(() => start() && waiting.disconnect());
  waiting.observe(document, { childList: true, subtree: true });
})();
