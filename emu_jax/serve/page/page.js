"use strict";

const $ = (id) => document.getElementById(id);
const TABS = {
  chat: {
    path: "api/chat", submit: "Send", clear: "New chat", accept: "image/*,video/*",
    label: "Your message", placeholder: "Ask something.",
    settings: ["temperature", "top_p", "num_beams", "max_new_tokens", "seed"],
  },
  draw: {
    path: "api/draw", submit: "Draw", clear: "Clear", accept: "image/*",
    label: "Text", placeholder: "Describe the image.",
    settings: ["guidance_scale", "num_inference_steps", "seed", "height", "width"],
  },
  continue: {
    path: "api/continue", submit: "Continue", clear: "Clear", accept: "image/*,video/*",
    label: "Text", placeholder: "Begin a sequence.",
    settings: ["temperature", "top_p", "max_new_tokens", "max_images", "seed", "guidance_scale",
      "num_inference_steps", "height", "width"],
  },
};
const DROP = matchMedia("(pointer: fine)").matches ? " You can drop or paste images here." : "";
// Of the number fields: smallest value, step, and largest value where the server names none.
const FIELDS = {
  temperature: [0, 0.1, 2], top_p: [0, 0.05, 1], num_beams: [1, 1], max_new_tokens: [1, 1],
  max_images: [0, 1], seed: [0, 1, 2 ** 31 - 1], guidance_scale: [0, 0.5, 30],
  num_inference_steps: [1, 1], height: [1, 1], width: [1, 1],
};
const HELP = {
  temperature: "0 always takes the likeliest token", top_p: "the share of likely tokens to sample from",
  num_beams: "more than 1 searches, and does not stream", max_new_tokens: "the longest answer",
  max_images: "the most images of a continuation", seed: "the same seed gives the same answer",
  guidance_scale: "how closely an image follows the prompt", num_inference_steps: "more are slower",
  height: "of an image, in pixels", width: "of an image, in pixels",
};
const messages = []; // of the chat: {role, parts}
const waiting = { chat: [], draw: [], continue: [] }; // parts of the prompt that is being written
let running = null; // the AbortController of the request in progress
let model = { defaults: {}, limits: {}, examples: {} };

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// --- Tabs ---

function select(name, focus = false) {
  for (const other of Object.keys(TABS)) {
    const tab = $(`${other}-tab`);
    $(other).hidden = other !== name;
    tab.setAttribute("aria-selected", String(other === name));
    tab.tabIndex = other === name ? 0 : -1;
  }
  $(`${name}-form`).after($("status"), $("problem")); // above a long gallery, where they are seen
  if (focus) $(`${name}-tab`).focus();
}

document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const tabs = [...document.querySelectorAll("[role=tab]:not(:disabled)")];
  const at = tabs.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  select(tabs[(to + tabs.length) % tabs.length].id.replace("-tab", ""), true);
});

// --- Prompts ---

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",", 2)[1]);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function addFiles(name, files) {
  for (const file of files) {
    const kind = file.type.startsWith("video/") ? "video" : "picture";
    waiting[name].push({ [kind]: await base64(file), type: file.type });
  }
  showParts(name);
}

// Text is only ever text: nothing here is read as HTML.
function element(part) {
  if ("text" in part) return make("span", { textContent: part.text });
  if ("video" in part) {
    const bytes = Uint8Array.from(atob(part.video), (c) => c.charCodeAt(0));
    const source = URL.createObjectURL(new Blob([bytes], { type: part.type }));
    return make("video", { src: source, controls: true });
  }
  const source = `data:${part.type || "image/png"};base64,${part.picture}`;
  return make("img", { src: source, alt: "an image" });
}

function showParts(name) {
  $(`${name}-parts`).replaceChildren(
    ...waiting[name].map((part, n) => {
      const remove = make("button", { type: "button", textContent: "×", title: "Remove" });
      remove.setAttribute("aria-label", "Remove this part");
      remove.addEventListener("click", () => {
        waiting[name].splice(n, 1);
        showParts(name);
      });
      return make("span", {}, element(part), remove);
    }),
  );
}

// Moves the text of the field to the parts of the prompt.
function addText(name) {
  const text = $(`${name}-text`).value.trim();
  if (text) waiting[name].push({ text });
  $(`${name}-text`).value = "";
  showParts(name);
}

// Returns the parts of the prompt; the text field holds the last one.
function prompt(name) {
  const text = $(`${name}-text`).value.trim();
  return text ? [...waiting[name], { text }] : [...waiting[name]];
}

function clear(name) {
  waiting[name] = [];
  $(`${name}-text`).value = "";
  showParts(name);
}

const bare = ({ type, ...part }) => part; // without what only the page needs

function settings(name) {
  const fields = TABS[name].settings.map((field) => [field, $(`${name}-${field}`).value]);
  return Object.fromEntries(fields.filter(([, v]) => v !== "").map(([n, v]) => [n, Number(v)]));
}

function composer(name) {
  const form = $(`${name}-form`), tab = TABS[name];
  form.append($("composer").content.cloneNode(true));
  const [parts, text, file] = ["parts", "textarea", "input"].map((kind) =>
    form.querySelector(kind === "parts" ? ".parts" : kind === "input" ? ".file input" : kind));
  parts.id = `${name}-parts`;
  Object.assign(text, { id: `${name}-text`, placeholder: tab.placeholder + DROP });
  text.setAttribute("aria-label", tab.label);
  Object.assign(file, { id: `${name}-file`, accept: tab.accept });
  file.addEventListener("change", async () => {
    await addFiles(name, file.files);
    file.value = "";
  });
  for (const button of ["add", "clear", "stop"]) {
    form.querySelector(`.${button}`).id = `${name}-${button}`;
  }
  $(`${name}-clear`).textContent = tab.clear;
  form.querySelector(".primary").textContent = tab.submit;
  $(`${name}-add`).addEventListener("click", () => addText(name));
  $(`${name}-add`).hidden = name === "chat";
  $(`${name}-add`).title = "Keep this text, and add an image or more text behind it";
  if (tab.accept.includes("video")) {
    form.querySelector(".file").firstChild.textContent = "Add image or video ";
  }
  $(`${name}-stop`).addEventListener("click", () => running?.abort());
  for (const field of tab.settings) {
    const [min, step, max] = FIELDS[field];
    const input = make("input", { type: "number", id: `${name}-${field}`, min, step });
    if (max !== undefined) input.max = max;
    input.title = HELP[field];
    form.querySelector(".fields").append(make("label", { title: HELP[field] }, field, input));
  }
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  text.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) {
      event.preventDefault();
      addFiles(name, files);
    }
  });
  form.addEventListener("dragover", (event) => {
    event.preventDefault();
    form.classList.add("over");
  });
  form.addEventListener("dragleave", () => form.classList.remove("over"));
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    form.classList.remove("over");
    addFiles(name, [...event.dataTransfer.files].filter((f) => /^(image|video)\//.test(f.type)));
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

// --- Requests ---

// Sends a prompt, and passes each part of the answer on as it comes.
async function ask(name, body, onPart) {
  running?.abort();
  const mine = (running = Object.assign(new AbortController(), { tab: name }));
  $("problem").textContent = "";
  $("status").textContent = "Working …";
  $(`${name}-stop`).disabled = false;
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  let denoising = null; // when the first preview came: {step, time}
  try {
    const response = await fetch(TABS[name].path, {
      method: "POST", headers, body: JSON.stringify({ ...body, progress: true }),
      signal: mine.signal,
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
        if ("waiting" in part) {
          $("status").textContent =
            part.warming_up ? "The server has just started and is still getting ready. This can " +
              "take minutes; your request is answered then."
              : part.waiting ? `Waiting: number ${part.waiting} in the queue` + left(part.seconds)
                : "Working …";
        } else if ("preview" in part) {
          denoising ??= { step: part.step, time: performance.now() };
          const rate = (performance.now() - denoising.time) / (part.step - denoising.step);
          $("status").textContent = `Denoising: step ${part.step} of ${part.steps}` +
            left((rate * (part.steps - part.step)) / 1000);
          showPreview(name, part);
        } else if (!part.done) {
          denoising = null;
          showPreview(name, null);
          onPart(part);
        }
      }
    }
    return true;
  } catch (error) {
    if (error.name !== "AbortError") $("problem").textContent = error.message;
    return false;
  } finally {
    if (running === mine) {
      running = null;
      $("status").textContent = "";
    }
    if (running?.tab !== name) { // otherwise they belong to the next request
      $(`${name}-stop`).disabled = true;
      showPreview(name, null);
    }
  }
}

const left = (seconds) =>
  seconds != null && Number.isFinite(seconds) ? `, about ${Math.ceil(seconds)} s left` : "";

function showPreview(name, part) {
  const box = $(`${name}-preview`);
  if (!box) return;
  const shown = part && make("div", {},
    make("img", { src: part.preview, alt: "a preview of the image" }),
    make("progress", { max: part.steps, value: part.step }));
  box.replaceChildren(...(shown ? [shown] : []));
}

// An image with its prompt if `titled`, the settings that made it, and a link to save it.
function figure(source, parts, used, titled) {
  const words = parts.filter((part) => "text" in part).map((part) => part.text).join(" ");
  const made = Object.entries(used).map(([n, v]) => `${n} ${v}`).join(", ");
  const name = `${(words || "image").replace(/[^\w]+/g, "-").slice(0, 40)}.png`;
  return make("figure", {},
    make("img", { src: source, alt: `generated: ${words || "from images"}` }),
    make("figcaption", {},
      ...(titled ? [make("strong", { textContent: words || "from images" })] : []),
      `${made} `, make("a", { href: source, download: name, textContent: "Download" })));
}

// The settings of a request, with the defaults of those that it did not name.
function usedSettings(name, given) {
  const names = TABS[name].settings.filter((n) => n in given || model.defaults[n] != null);
  return Object.fromEntries(names.map((n) => [n, given[n] ?? model.defaults[n]]));
}

for (const name of Object.keys(TABS)) {
  composer(name);
  $(`${name}-tab`).addEventListener("click", () => select(name));
}

function say(role, parts) {
  const item = make("li", { className: role }, ...parts.map(element));
  $("said").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

// Adds a part of an answer to a list of parts, and shows it behind the others.
function append(answer, box, part) {
  const last = answer.at(-1);
  if ("text" in part && last && "text" in last) {
    last.text += part.text;
    box.lastChild.textContent = last.text;
  } else {
    answer.push(part);
    box.append(element(part));
  }
}

$("chat-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const parts = prompt("chat");
  if (!parts.length || running?.tab === "chat") return; // one turn at a time
  clear("chat");
  const asked = { role: "user", parts: parts.map(bare) };
  messages.push(asked);
  say("user", parts);
  const item = say("assistant", []);
  const answer = [];
  await ask("chat", { messages, settings: settings("chat") }, (part) => {
    if ("picture" in part) part = { picture: part.picture.split(",", 2)[1] };
    append(answer, item, part);
  });
  if (!messages.includes(asked)) return; // a new chat has begun
  item.dataset.done = "true";
  // A question without an answer is not part of the chat.
  if (answer.length) messages.push({ role: "assistant", parts: answer });
  else {
    messages.pop();
    item.remove();
  }
});
$("chat-clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("said").replaceChildren();
  clear("chat");
});

$("draw-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const parts = prompt("draw"); // they stay, to draw again
  if (!parts.length) return;
  const given = settings("draw");
  await ask("draw", { parts: parts.map(bare), settings: given }, (part) => {
    $("drawn").prepend(figure(part.picture, parts, usedSettings("draw", given), true));
  });
});
$("draw-clear").addEventListener("click", () => clear("draw"));

$("continue-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const parts = prompt("continue");
  if (!parts.length) return;
  const given = settings("continue");
  const box = $("continued");
  delete box.dataset.done;
  box.replaceChildren(
    make("h2", { textContent: "Prompt" }),
    make("div", { className: "given" }, ...parts.map(element)),
    make("h2", { textContent: "Continuation" }));
  let text = null;
  await ask("continue", { parts: parts.map(bare), settings: given }, (part) => {
    if ("picture" in part) {
      text = null;
      box.append(figure(part.picture, parts, usedSettings("continue", given), false));
    } else {
      if (!text) box.append((text = make("span")));
      text.textContent += part.text;
    }
  });
  box.dataset.done = "true";
});
$("continue-clear").addEventListener("click", () => {
  clear("continue");
  $("continued").replaceChildren();
});

// --- What the model is, and examples ---

function showExamples(name) {
  const examples = model.examples[name] ?? [];
  $(`${name}-examples`).replaceChildren(
    ...(examples.length ? [make("span", { textContent: "Try" })] : []),
    ...examples.map((example) => {
      const button = make("button", { type: "button" }, ...example.parts.map(element));
      button.addEventListener("click", () => {
        clear(name);
        waiting[name] = example.parts.slice(0, -1);
        const last = example.parts.at(-1);
        if ("text" in last) $(`${name}-text`).value = last.text;
        else waiting[name] = [...example.parts];
        for (const [field, value] of Object.entries(example.settings ?? {})) {
          const input = $(`${name}-${field}`);
          if (input) input.value = value;
        }
        showParts(name);
        $(`${name}-text`).focus();
      });
      return button;
    }),
  );
}

const listed = (items) => new Intl.ListFormat("en").format(items);

function describe() {
  const does = model.instruct ? ["chats about images and videos"]
    : ["describes images", "continues text"];
  if (model.paints) {
    const others = model.size_step ? " or other sizes" : "";
    does.push(`draws images of ${model.image_size} × ${model.image_size} pixels${others}`);
  }
  const family = { emu: "Emu", emu2: "Emu2" }[model.family] ?? model.family;
  $("name").textContent = model.name;
  document.title = `${model.name} · Emu`;
  $("summary").textContent = `${family}, a multimodal model: it ${listed(does)}. ` +
    `A prompt with its answer has up to ${model.positions} tokens.`;
  if (!model.instruct) {
    $("chat-hint").textContent = "Add an image and the model describes it, or begin a text and " +
      "the model continues it. It was not trained to follow instructions.";
    $("chat-text").placeholder = `Begin a text, or leave this empty.${DROP}`;
  }
  $("key-label").hidden = !model.needs_key;
  for (const [name, tab] of Object.entries(TABS)) {
    for (const field of tab.settings) {
      const input = $(`${name}-${field}`);
      const standard = model.defaults[field];
      input.placeholder = standard == null ? "default" : `default: ${standard}`;
      if (field in model.limits) input.max = model.limits[field];
      if (field === "height" || field === "width") {
        input.parentElement.hidden = !model.size_step;
        input.min = input.step = model.size_step ?? 1;
      }
    }
    showExamples(name);
  }
  if (!model.paints) {
    $("draw-tab").disabled = true;
    $("draw-tab").title = "This model has no decoder of images.";
  }
}

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => sessionStorage.setItem("key", $("key").value));

fetch("api/model").then((response) => response.json()).then((answer) => {
  model = answer;
  describe();
});
