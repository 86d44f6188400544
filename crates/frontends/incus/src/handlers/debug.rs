//! `/1.0/instances/{name}/debug`: what is in a virtual machine's memory.

use super::files::frames;
use crate::{
    app::Call,
    respond::{Reply, stream},
    stream::Stream,
};
use hyper::{
    Response,
    header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue},
};
use karst_model::{Result, memory::DumpFormat};

/// `GET /1.0/instances/{name}/debug/memory?format=elf`: it begins when all of the memory is written; the machine goes on by then.
///
/// # Errors
/// Those of the engine.
pub async fn memory(call: Call) -> Result<Reply> {
    let format = match call.query.get("format").filter(|f| !f.is_empty()) {
        Some(text) => DumpFormat::parse(text)?,
        None => DumpFormat::Elf,
    };
    let (size, fd) =
        call.engine().machine_memory(&call.context, call.project(), call.param(0), format).await?;
    let mut reply: Reply = Response::new(stream(frames(vec![Err(Stream::new(fd)?)])));
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(size));
    headers.insert(CONTENT_DISPOSITION, HeaderValue::from_static("inline;filename=memory.dump"));
    Ok(reply)
}
