// Holds a chat in Open WebUI at `url` like a person and prints what it saw as one JSON object.
// node open_webui.mjs URL FOLDER CHROMIUM QUESTION...

import { chromium } from "playwright-core";

const [url, folder, executablePath, ...questions] = process.argv.slice(2);
const WAIT = 120_000; // ms; a machine that is only busy takes less
const browser = await chromium.launch({ executablePath, headless: true, args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage({ viewport: { width: 1100, height: 800 } });
page.setDefaultTimeout(WAIT);
const seen = { answers: [] };
const answers = page.locator(".chat-assistant");
try {
  await page.goto(url);
  await page.locator("#chat-input").waitFor();
  seen.model = await page.locator("#model-selector-model-button").innerText();
  // News of the release lie over the page, sooner or later.
  await page.addLocatorHandler(page.getByRole("button", { name: "Okay, Let's Go!" }), (button) => button.click());
  for (const [index, question] of questions.entries()) {
    await page.locator("#chat-input").click();
    await page.keyboard.insertText(question);
    await page.locator("#send-message-button").click();
    await answers.nth(index).waitFor();
    // The buttons below an answer come once it has ended.
    await page.getByRole("button", { name: "Regenerate" }).nth(index).waitFor();
    seen.answers.push(await answers.nth(index).innerText());
    await page.screenshot({ path: `${folder}/open-webui-${index}.png` });
  }
  await page.reload();
  await answers.nth(questions.length - 1).waitFor();
  seen.reloaded = await answers.allInnerTexts();
} catch (error) {
  seen.failure = String(error);
  await page.screenshot({ path: `${folder}/open-webui-failure.png` });
}
console.log(JSON.stringify(seen));
await browser.close();
