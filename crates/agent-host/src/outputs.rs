//! What programs print that run while nobody listens: files of the guest's directory, which go with it. Control writes into a
//! pipe; what is kept of that, and how much, is decided here.

use crate::{RealAgent, agent::blocking};
use karst_agent::{ExecOutput, OUTPUT_BYTES, OUTPUTS, WithFds};
use karst_model::{InstanceId, Result, SessionId};
use rustix::pipe::{PipeFlags, pipe_with};
use std::{
    fs::File,
    io::{self, ErrorKind},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe::Receiver,
};

const DIRECTORY: &str = "exec-output";

impl RealAgent {
    fn outputs_at(&self, instance: InstanceId) -> PathBuf {
        self.registry.guest_dir(instance).join(DIRECTORY)
    }

    pub(crate) async fn keep_output(&self, output: ExecOutput) -> Result<WithFds<SessionId>> {
        self.known(output.instance)?;
        self.sessions.room()?;
        let directory = self.outputs_at(output.instance);
        let file = blocking(move || Ok(create(&directory, &output)?)).await?;
        let (source, sink): (OwnedFd, OwnedFd) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        let source = Receiver::from_file(File::from(source))?;
        let session = self.sessions.file_write(output.instance, async move { Ok(keep(source, file).await?) });
        Ok(WithFds { value: session, fds: vec![sink] })
    }

    pub(crate) async fn outputs(&self, instance: InstanceId) -> Result<Vec<ExecOutput>> {
        self.known(instance)?;
        let directory = self.outputs_at(instance);
        blocking(move || Ok(there(&directory, instance)?.into_iter().map(|(_, output)| output).collect()))
            .await
    }

    pub(crate) async fn open_output(&self, output: ExecOutput) -> Result<WithFds<()>> {
        self.known(output.instance)?;
        let path = self.outputs_at(output.instance).join(output.name());
        blocking(move || match File::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Err(output.missing()),
            opened => Ok(WithFds { value: (), fds: vec![opened?.into()] }),
        })
        .await
    }

    pub(crate) async fn delete_output(&self, output: ExecOutput) -> Result<()> {
        self.known(output.instance)?;
        let path = self.outputs_at(output.instance).join(output.name());
        blocking(move || match std::fs::remove_file(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Err(output.missing()),
            removed => Ok(removed?),
        })
        .await
    }
}

/// Those that are kept, the oldest first.
fn there(directory: &Path, instance: InstanceId) -> io::Result<Vec<(std::time::SystemTime, ExecOutput)>> {
    let entries = match std::fs::read_dir(directory) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
        entries => entries?,
    };
    let mut all = vec![];
    for entry in entries {
        let entry = entry?;
        if let Some(output) = entry.file_name().to_str().and_then(|name| ExecOutput::named(instance, name)) {
            match entry.metadata() {
                // Deleted meanwhile.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                found => all.push((found?.modified()?, output)),
            }
        }
    }
    all.sort();
    Ok(all)
}

fn create(directory: &Path, output: &ExecOutput) -> io::Result<File> {
    match std::fs::create_dir(directory) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let kept = there(directory, output.instance)?;
    for (_, old) in kept.iter().take((kept.len() + 1).saturating_sub(OUTPUTS)) {
        match std::fs::remove_file(directory.join(old.name())) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    File::options().write(true).create(true).truncate(true).mode(0o600).open(directory.join(output.name()))
}

/// Keeps the beginning of a stream, and reads it to its end, so that nobody waits for room in it, nor ends for want of a reader:
/// also where it cannot be kept.
async fn keep(mut source: Receiver, file: File) -> io::Result<()> {
    let mut file = tokio::fs::File::from_std(file);
    let (mut buffer, mut room, mut kept) = (vec![0; 16 << 10], OUTPUT_BYTES, Ok(()));
    loop {
        let n = source.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        let wanted = n.min(usize::try_from(room).unwrap_or(usize::MAX));
        room -= wanted as u64;
        if kept.is_ok() && wanted > 0 {
            kept = file.write_all(&buffer[..wanted]).await;
        }
    }
    kept?;
    // What it was given last is written on the side.
    file.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_agent::OutputStream;
    use karst_model::OperationId;
    use std::io::{Read, Write};

    fn output(n: u128) -> ExecOutput {
        let id = uuid::Uuid::from_u128(n);
        let instance = InstanceId(uuid::Uuid::from_u128(7));
        ExecOutput { instance, operation: OperationId(id), stream: OutputStream::Stdout }
    }

    #[tokio::test]
    async fn the_beginning_is_kept_and_all_of_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join(DIRECTORY);
        let file = create(&directory, &output(1)).unwrap();
        let (source, sink): (OwnedFd, OwnedFd) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let writer = std::thread::spawn(move || {
            let mut sink = File::from(sink);
            sink.write_all(&vec![b'a'; OUTPUT_BYTES as usize - 1]).unwrap();
            sink.write_all(&vec![b'b'; 1 << 20]).unwrap();
        });
        keep(Receiver::from_file(File::from(source)).unwrap(), file).await.unwrap();
        writer.join().unwrap();
        let mut text = vec![];
        File::open(directory.join(output(1).name())).unwrap().read_to_end(&mut text).unwrap();
        assert_eq!((text.len() as u64, text.last()), (OUTPUT_BYTES, Some(&b'b')));
    }

    #[tokio::test]
    async fn what_cannot_be_kept_is_read_all_the_same() {
        // Nothing can be written to it.
        let file = File::open("/dev/null").unwrap();
        let (source, sink): (OwnedFd, OwnedFd) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let writer = std::thread::spawn(move || File::from(sink).write_all(&vec![b'a'; 1 << 20]));
        keep(Receiver::from_file(File::from(source)).unwrap(), file).await.unwrap_err();
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn the_oldest_makes_room_and_what_is_none_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join(DIRECTORY);
        assert!(there(&directory, output(0).instance).unwrap().is_empty());
        for n in 0..OUTPUTS as u128 + 5 {
            let file = create(&directory, &output(n)).unwrap();
            // One a second, whatever the file system's clock says.
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000 + n as u64);
            file.set_modified(time).unwrap();
        }
        std::fs::write(directory.join("other"), "").unwrap();
        let kept = there(&directory, output(0).instance).unwrap();
        assert_eq!((kept.len(), kept[0].1), (OUTPUTS, output(5)));
        assert!(directory.join("other").exists());
    }
}
