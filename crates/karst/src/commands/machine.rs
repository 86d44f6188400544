//! `reset`, `screenshot`, `send-key`: screen, keyboard and reset button of virtual machines.

use std::path::PathBuf;

use hyper::{HeaderMap, Method};
use serde_json::json;

use super::completion::complete;
use crate::{
    client::{About, Kind, Url, empty},
    context::Context,
    error::{Error, Result},
    output, terminal,
};

/// Options of `reset`.
#[derive(Debug, clap::Args)]
pub struct Reset {
    /// Virtual machine
    #[arg(add = complete(Kind::Instance))]
    instance: String,
}

/// Options of `screenshot`.
#[derive(Debug, clap::Args)]
pub struct Screenshot {
    /// Virtual machine
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// File for the picture (PNG); - is standard output
    #[arg(default_value = "-")]
    file: PathBuf,
}

/// Options of `send-key`.
#[derive(Debug, clap::Args)]
pub struct SendKey {
    /// Virtual machine
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// Keys, one after the other; held together with - between them: ctrl-alt-delete, f2, a
    #[arg(required = true)]
    keys: Vec<String>,
}

fn url(instance: &str, what: &str) -> Url {
    Url::new(&["karst", "instances", instance, what])
}

impl Reset {
    /// Presses the reset button.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let answer = client.post(&url(&self.instance, "reset"), &json!({})).await;
        answer.about(client, Kind::Instance, &self.instance).map(drop)
    }
}

impl Screenshot {
    /// Writes the picture.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let to_stdout = self.file.as_os_str() == "-";
        if to_stdout && terminal::is_terminal(rustix::stdio::stdout()) {
            return Err(Error::local("a picture is not for a terminal; give a file, such as screen.png"));
        }
        let work = async {
            let url = url(&self.instance, "screenshot");
            let response = client.send(Method::GET, &url, HeaderMap::new(), empty()).await?;
            client.bytes(response).await
        };
        let picture = work.await.about(client, Kind::Instance, &self.instance)?;
        if to_stdout {
            return output::write(&picture);
        }
        std::fs::write(&self.file, picture).map_err(|e| Error::local(format!("{}: {e}", self.file.display())))
    }
}

impl SendKey {
    /// Presses the keys.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let answer = client.post(&url(&self.instance, "keys"), &json!({"keys": self.keys})).await;
        answer.about(client, Kind::Instance, &self.instance).map(drop)
    }
}
