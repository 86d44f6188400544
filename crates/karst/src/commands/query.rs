//! `query`: a request as it is.

use hyper::{HeaderMap, Method, header::HeaderValue};
use serde_json::Value;

use crate::{
    client::{Operation, Url, decode, empty, full, operation::outcome},
    context::{Context, read_text},
    error::{Error, Result},
    output,
};

/// Options of `query`.
#[derive(Debug, clap::Args)]
pub struct Query {
    /// Path, such as /1.0/instances?recursion=1
    path: String,
    /// Method
    #[arg(short = 'X', long = "request", value_name = "METHOD", default_value = "GET")]
    method: String,
    /// Body, JSON; "@FILE" reads a file, "-" stdin
    #[arg(short, long)]
    data: Option<String>,
    /// Wait for the operation and print it
    #[arg(long)]
    wait: bool,
    /// The answer as it came, with its envelope
    #[arg(long, conflicts_with = "wait")]
    raw: bool,
}

impl Query {
    /// Sends it and prints the answer's metadata.
    pub async fn run(self, context: &Context) -> Result<()> {
        if !self.path.starts_with('/') {
            return Err(Error::Usage(format!("\"{}\" is no path: it begins with /", self.path)));
        }
        let method = Method::from_bytes(self.method.to_uppercase().as_bytes())
            .map_err(|_| Error::Usage(format!("\"{}\" is no method", self.method)))?;
        let client = &context.client;
        let url = Url::raw(&self.path);
        let mut headers = HeaderMap::new();
        let body = match self.data {
            None => empty(),
            Some(data) => {
                headers.insert(hyper::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                let data = match data.strip_prefix('@') {
                    Some(file) => read_text(file.as_ref())?,
                    None if data == "-" => read_text("-".as_ref())?,
                    None => data,
                };
                full(data)
            }
        };
        let response = client.send(method, &url, headers, body).await?;
        let bytes = client.bytes(response).await?;
        if self.raw {
            return output::write(&bytes);
        }
        let Ok(envelope) = serde_json::from_slice::<Value>(&bytes) else {
            return output::write(&bytes);
        };
        let Some(metadata) = envelope.get("metadata").cloned() else {
            return output::write(&bytes);
        };
        if self.wait && envelope["type"] == "async" {
            let operation: Operation = decode(metadata)?;
            outcome(client.wait_final(&operation.id).await?)?;
            let ended = client.get(&Url::new(&["operations", &operation.id])).await;
            return match ended {
                Ok(answer) => print(&answer.metadata),
                // Servers forget finished operations soon.
                Err(error) if error.is_not_found() => Ok(()),
                Err(error) => Err(error),
            };
        }
        print(&metadata)
    }
}

fn print(value: &Value) -> Result<()> {
    match value {
        Value::Null => Ok(()),
        Value::String(text) => output::line(text),
        other => output::line(&serde_json::to_string_pretty(other).map_err(Error::local)?),
    }
}
