//! `version`.

use crate::{
    client::Url,
    context::Context,
    error::{Error, Result},
    output::{self, member},
};

/// Prints the versions of both sides; a server that is not there is no failure.
pub async fn run(context: &Context) -> Result<()> {
    output::line(&format!("Client version: {}", env!("CARGO_PKG_VERSION")))?;
    match context.client.get(&Url::new(&[])).await {
        Ok(answer) => {
            let environment = &answer.metadata["environment"];
            let (name, version) = (member(environment, "server"), member(environment, "server_version"));
            output::line(format!("Server version: {name} {version}").trim_end())
        }
        Err(Error::Unreachable(_)) => output::line("Server version: unreachable"),
        Err(error) => Err(error),
    }
}
