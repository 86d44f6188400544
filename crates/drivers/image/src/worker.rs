//! Entry point of the worker process.

use crate::unpack::{Answer, Found, Part, Task, unpack};
use std::{io::Write, path::Path};

/// Becomes a worker; never returns. Call it first thing in `main`, before any thread exists, from the hidden subcommand
/// that the [`karst_host::sandbox::Launcher`] names, with the argument that follows it.
pub fn main(plan: &str) -> ! {
    karst_host::sandbox::main(plan, call)
}

fn call(name: &str, argument: serde_json::Value) -> i32 {
    match name {
        "unpack" => {
            let answer = match serde_json::from_value::<Task>(argument) {
                Ok(task) => Answer::from(image(&task)),
                Err(e) => Answer::from(Err(e.into())),
            };
            let mut out = std::io::stdout().lock();
            match serde_json::to_writer(&mut out, &answer)
                .map_err(std::io::Error::from)
                .and_then(|()| out.flush())
            {
                Ok(()) => 0,
                Err(_) => 1,
            }
        }
        "ova" => {
            let answer = match appliance(argument) {
                Ok(found) => crate::ova::Answer::Done(found),
                Err(e) => crate::ova::Answer::Failed(e),
            };
            let mut out = std::io::stdout().lock();
            let written = serde_json::to_writer(&mut out, &answer).map_err(std::io::Error::from);
            i32::from(written.and_then(|()| out.flush()).is_err())
        }
        "pack" => told(crate::pack::pack(Path::new("/tree"), std::io::stdout().lock())),
        "backup-pack" => told(backup_pack(argument)),
        "backup-index" => match crate::backup::index(std::io::stdin().lock(), "backup") {
            Ok(index) => {
                let mut out = std::io::stdout().lock();
                let written = serde_json::to_writer(&mut out, &index).map_err(std::io::Error::from);
                told(written.and_then(|()| out.flush()).map_err(Into::into))
            }
            Err(e) => {
                // Nobody is left to tell when this fails.
                let _ = write!(std::io::stderr(), "{}", e.message);
                65
            }
        },
        "store" => told(crate::pack::store(std::io::stdin().lock(), Path::new("/out/upload"))),
        _ => 64,
    }
}

/// An image as it was uploaded, or a part of one.
fn image(task: &Task) -> karst_model::Result<Found> {
    let out = Path::new("/out");
    if task.part == Part::Unified {
        let input = std::fs::File::from(rustix::io::dup(std::io::stdin()).map_err(std::io::Error::from)?);
        if input.metadata()?.is_file() {
            if let Some(found) = crate::oci::unpack(&input, out, &task.field, task.bounds)? {
                return Ok(found);
            }
            std::io::Seek::rewind(&mut &input)?;
        }
    }
    unpack(std::io::stdin().lock(), out, task)
}

fn appliance(bounds: serde_json::Value) -> karst_model::Result<crate::ova::Appliance> {
    let input = rustix::io::dup(std::io::stdin()).map_err(std::io::Error::from)?;
    crate::ova::extract("disk", input.into(), Path::new("/out/disk"), serde_json::from_value(bounds)?)
}

fn backup_pack(piece: serde_json::Value) -> karst_model::Result<()> {
    let piece = serde_json::from_value(piece)?;
    // Standard output of the library is buffered by lines.
    let out = rustix::io::dup(std::io::stdout()).map_err(std::io::Error::from)?;
    crate::backup::pack(&piece, Path::new("/tree"), Path::new("/disk.img"), out.into()).map(drop)
}

/// The exit code of a task whose standard output is not an answer: 28 when the disk is full.
fn told(outcome: karst_model::Result<()>) -> i32 {
    match outcome {
        Ok(()) => 0,
        Err(e) => {
            // Nobody is left to tell when this fails.
            let _ = writeln!(std::io::stderr(), "{e}: {}", e.context.as_deref().unwrap_or_default());
            if e.is(karst_model::ErrorKind::Quota) { 28 } else { 1 }
        }
    }
}
