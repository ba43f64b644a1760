"use strict";

const $ = (id) => document.getElementById(id);
const messages = []; // of the chat: {role, parts}
const waiting = { chat: [], draw: [] }; // parts of the message that is being written
let running = null; // the AbortController of the request under way

for (const name of ["chat", "draw"]) {
  $(`${name}-tab`).addEventListener("click", () => {
    for (const other of ["chat", "draw"]) {
      $(other).hidden = other !== name;
      $(`${other}-tab`).setAttribute("aria-selected", String(other === name));
    }
  });
  $(`${name}-file`).addEventListener("change", async (event) => {
    const input = event.target;
    for (const file of input.files) {
      const kind = file.type.startsWith("video/") ? "video" : "picture";
      waiting[name].push({ [kind]: await base64(file), type: file.type });
    }
    input.value = "";
    showParts(name);
  });
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",", 2)[1]);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// What a part looks like. Text is only ever text: nothing here is read as HTML.
function element(part) {
  if ("text" in part) {
    return Object.assign(document.createElement("span"), { textContent: part.text });
  }
  if ("video" in part) {
    const bytes = Uint8Array.from(atob(part.video), (c) => c.charCodeAt(0));
    const source = URL.createObjectURL(new Blob([bytes], { type: part.type }));
    return Object.assign(document.createElement("video"), { src: source, controls: true });
  }
  const source = `data:${part.type || "image/png"};base64,${part.picture}`;
  return Object.assign(document.createElement("img"), { src: source, alt: "an image" });
}

function showParts(name) {
  $(`${name}-parts`).replaceChildren(
    ...waiting[name].map((part, n) => {
      const box = document.createElement("span");
      const remove = Object.assign(document.createElement("button"), {
        type: "button", textContent: "×", title: "Remove",
      });
      remove.addEventListener("click", () => {
        waiting[name].splice(n, 1);
        showParts(name);
      });
      box.append(element(part), remove);
      return box;
    }),
  );
}

// The parts of a message, with what stands in the text field as the last.
function take(name) {
  const text = $(`${name}-text`).value.trim();
  const parts = text ? [...waiting[name], { text }] : waiting[name];
  waiting[name] = [];
  $(`${name}-text`).value = "";
  showParts(name);
  return parts;
}

const bare = ({ type, ...part }) => part; // without what only the page needs

function settings(fields) {
  const given = Object.entries(fields).map(([name, id]) => [name, $(id).value]);
  return Object.fromEntries(given.filter(([, v]) => v !== "").map(([n, v]) => [n, Number(v)]));
}

// Sends a request and hands each part of the answer over as it comes.
async function ask(path, body, onPart) {
  running?.abort();
  const mine = (running = new AbortController());
  $("problem").textContent = "";
  $("chat-stop").disabled = false;
  try {
    const response = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body), signal: mine.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const part = JSON.parse(line);
        if (part.error) throw new Error(part.error);
        if (!part.done) onPart(part);
      }
    }
    return true;
  } catch (error) {
    if (error.name !== "AbortError") $("problem").textContent = error.message;
    return false;
  } finally {
    if (running === mine) {
      running = null;
      $("chat-stop").disabled = true;
    }
  }
}

function say(role, parts) {
  const item = document.createElement("li");
  item.className = role;
  item.append(...parts.map(element));
  $("said").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

$("chat-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const parts = take("chat");
  if (!parts.length) return;
  messages.push({ role: "user", parts: parts.map(bare) });
  say("user", parts);
  const item = say("assistant", []);
  const answer = [];
  const request = { messages, settings: settings({ max_new_tokens: "chat-tokens" }) };
  await ask("api/chat", request, (part) => {
    if ("picture" in part) part = { picture: part.picture.split(",", 2)[1] };
    const last = answer.at(-1);
    if ("text" in part && last && "text" in last) {
      last.text += part.text;
      item.lastChild.textContent = last.text;
    } else {
      answer.push(part);
      item.append(element(part));
    }
  });
  item.dataset.done = "true";
  // What was not answered is not part of the chat.
  if (answer.length) messages.push({ role: "assistant", parts: answer });
  else messages.pop();
});

$("chat-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("chat-form").requestSubmit();
  }
});
$("chat-stop").addEventListener("click", () => running?.abort());
$("chat-clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("said").replaceChildren();
});

$("draw-add").addEventListener("click", () => {
  waiting.draw = take("draw");
  showParts("draw");
});
$("draw-clear").addEventListener("click", () => {
  waiting.draw = [];
  showParts("draw");
});
$("draw-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("draw-text").value.trim();
  // They stay, to draw again.
  const parts = [...waiting.draw, ...(text ? [{ text }] : [])].map(bare);
  if (!parts.length) return;
  const fields = {
    seed: "draw-seed", guidance_scale: "draw-guidance", num_inference_steps: "draw-steps",
  };
  await ask("api/draw", { parts, settings: settings(fields) }, (part) => {
    const image = Object.assign(document.createElement("img"), {
      src: part.picture, alt: "what was drawn",
    });
    $("drawn").replaceChildren(image);
  });
});

fetch("api/about").then((r) => r.json()).then((about) => {
  if (!about.paints) $("draw-tab").disabled = true;
});
