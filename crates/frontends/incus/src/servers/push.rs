//! Bringing an image to a server that awaits it, as Incus does: an upload that shows a secret, and the wait for its operation.

use super::{ANSWER, TELL, encoded, https::Https, json, nonsense, query};
use crate::image_files::content;
use http_body_util::BodyExt;
use hyper::{
    StatusCode,
    header::{CONTENT_TYPE, HeaderName},
};
use karst_engine::images::{push::PushedImage, remote::RemoteSource};
use karst_model::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Seconds of each wait: less than a server may take to begin an answer.
const WAIT: u32 = 20;
/// Between two questions, where the answer comes sooner.
const APART: std::time::Duration = std::time::Duration::from_secs(1);

/// What the server says of its operation.
#[derive(Deserialize)]
struct OperationAnswer {
    id: String,
    status_code: u16,
    #[serde(default)]
    err: String,
    #[serde(default)]
    metadata: Option<Map<String, Value>>,
}

/// An answer, good or bad.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    error: String,
    metadata: Option<OperationAnswer>,
}

fn header(name: &'static str, value: String) -> (HeaderName, String) {
    (HeaderName::from_static(name), value)
}

/// Header values are ASCII without control characters; a file's name is shown and nothing else.
fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' }).take(255).collect()
}

/// What the server said of the upload: its operation.
fn begun(status: StatusCode, text: &[u8]) -> Result<OperationAnswer> {
    let answer: std::result::Result<Answer, _> = serde_json::from_slice(text);
    if status != StatusCode::ACCEPTED {
        let said = answer.map(|a| a.error).unwrap_or_default();
        let said: String = said.chars().filter(|c| !c.is_control()).take(500).collect();
        let why = if said.is_empty() { format!("it answers {status}") } else { said };
        return Err(Error::unavailable(format!("the server does not take the image: {why}")));
    }
    let answer = answer.map_err(|e| nonsense("answer", e))?;
    let operation = answer.metadata.ok_or_else(|| nonsense("answer", "it names no operation"))?;
    match operation.id.parse::<uuid::Uuid>() {
        Ok(_) => Ok(operation),
        Err(e) => Err(nonsense("answer", e)),
    }
}

pub(super) async fn push(
    https: &Https,
    target: &RemoteSource,
    image: PushedImage,
    told: &(dyn Fn(u64) + Send + Sync),
) -> Result<()> {
    let content = content(image.files)?;
    let mut headers = vec![
        (CONTENT_TYPE, content.content_type),
        header("x-incus-fingerprint", image.fingerprint),
        header("x-incus-filename", plain(&image.filename)),
    ];
    if let Some(secret) = &target.secret {
        headers.push(header("x-incus-secret", secret.clone()));
    }
    if let Some(profiles) = image.profiles.filter(|p| !p.is_empty()) {
        let all: Vec<String> = profiles.iter().map(|p| format!("profile={}", encoded(p))).collect();
        headers.push(header("x-incus-profiles", all.join("&")));
    }
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    let body = content.body.map_frame(move |frame| {
        let bytes = frame.data_ref().map_or(0, bytes::Bytes::len);
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        frame
    });
    let path = format!("/1.0/images{}", query(target, &[]));
    let upload = https.send(
        &path,
        &headers,
        body.boxed_unsync(),
        usize::try_from(ANSWER).unwrap_or(usize::MAX),
        || sent.load(Ordering::Relaxed),
    );
    let (status, text) = telling(upload, &sent, told).await?;
    let operation = begun(status, &text)?;
    let text = |m: &Option<Map<String, Value>>| Some(m.as_ref()?.get("secret")?.as_str()?.to_owned());
    let secret = text(&operation.metadata);
    let timeout = WAIT.to_string();
    let mut more = vec![("timeout", timeout.as_str())];
    more.extend(secret.as_deref().map(|s| ("secret", s)));
    let path = format!("/1.0/operations/{}/wait{}", encoded(&operation.id), query(target, &more));
    ended(operation, || json(https, &path)).await
}

/// Asks until the operation ended. A server that does not wait as it is asked to is not asked without a pause.
async fn ended<F>(mut operation: OperationAnswer, ask: impl Fn() -> F) -> Result<()>
where
    F: Future<Output = Result<OperationAnswer>>,
{
    while operation.status_code < 200 {
        let next = tokio::time::Instant::now() + APART;
        operation = ask().await?;
        if operation.status_code < 200 {
            tokio::time::sleep_until(next).await;
        }
    }
    match operation.status_code {
        200 => Ok(()),
        _ => {
            let said: String = operation.err.chars().filter(|c| !c.is_control()).take(500).collect();
            Err(Error::unavailable(format!("the server could not take the image in: {said}")))
        }
    }
}

/// Tells now and then what has gone while something is sent.
async fn telling<T>(
    work: impl Future<Output = Result<T>>,
    sent: &AtomicU64,
    told: &(dyn Fn(u64) + Send + Sync),
) -> Result<T> {
    let mut work = std::pin::pin!(work);
    let mut last = 0;
    loop {
        match tokio::time::timeout(std::time::Duration::from_secs(1), &mut work).await {
            Ok(done) => return done,
            Err(_) => {
                let now = sent.load(Ordering::Relaxed);
                if now - last >= TELL {
                    last = now;
                    told(now);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_does_not_wait_is_asked_with_pauses() {
        let answer = |status_code: u16| OperationAnswer {
            id: String::new(),
            status_code,
            err: "full".into(),
            metadata: None,
        };
        let asked = AtomicU64::new(0);
        let at = tokio::time::Instant::now();
        let codes = [103, 200];
        let told = ended(answer(103), || {
            let n = asked.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok(answer(codes[usize::try_from(n).unwrap()])))
        });
        told.await.unwrap();
        assert!(at.elapsed() >= APART && asked.load(Ordering::Relaxed) == 2);
        let never = || std::future::ready(Err(Error::unavailable("it is not asked")));
        ended(answer(200), never).await.unwrap();
        assert!(ended(answer(400), never).await.unwrap_err().message.ends_with("full"));
    }

    #[test]
    fn answers_of_servers_are_taken_with_care() {
        let id = "6c0f9a3e-0000-4000-8000-000000000001";
        let good = format!(
            r#"{{"type":"async","metadata":{{"id":"{id}","status_code":103,"metadata":{{"secret":"x"}}}}}}"#
        );
        assert_eq!(begun(StatusCode::ACCEPTED, good.as_bytes()).unwrap().id, id);
        let refused = br#"{"type":"error","error":"no such\u0007 secret","metadata":null}"#;
        let e = begun(StatusCode::FORBIDDEN, refused).err().unwrap();
        assert!(e.message.ends_with("no such secret"), "{e}");
        for wrong in ["", "{}", "[]", r#"{"metadata":{"id":"../x","status_code":103}}"#] {
            assert!(begun(StatusCode::ACCEPTED, wrong.as_bytes()).is_err(), "{wrong}");
        }
        assert!(begun(StatusCode::BAD_GATEWAY, b"<html>").err().unwrap().message.contains("502"));
        assert_eq!(plain("a b\r\nx: y\u{e4}"), "a_b__x:_y_");
    }
}
