//! What processors have in common: with this host's, with what its machines get, and with each other.

use super::{Answered, int, text};
use crate::{
    cpu::{self, Catalogue, Comparison, Cpu, Host},
    error::{Code, Part, VirError},
    session::Call,
    xdr::Reader,
};
use karst_model::ErrorKind;

/// `VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE`, `_VALIDATE_XML`.
const FAIL_INCOMPATIBLE: u32 = 1;
const VALIDATE: u32 = 2;
/// `VIR_CONNECT_BASELINE_CPU_EXPAND_FEATURES`, `_MIGRATABLE`.
const EXPAND: u32 = 1;
const MIGRATABLE: u32 = 2;
/// `REMOTE_CPU_BASELINE_MAX`
const MOST: usize = 256;

/// The models of this host's QEMU; none when it has no QEMU.
pub async fn catalogue(call: &Call) -> Result<Catalogue, VirError> {
    let session = &call.session;
    match session.front.engine.host_cpu_models(&session.context).await {
        Ok(models) => Ok(Catalogue::new(&models)),
        Err(e) if e.kind == ErrorKind::Unsupported => Ok(Catalogue::default()),
        Err(e) => Err(e.into()),
    }
}

/// What this host's kernel lists; nothing on another architecture.
pub async fn host(call: &Call) -> Result<Option<Host>, VirError> {
    let session = &call.session;
    Ok(Host::of(&session.front.engine.host_resources(&session.context).await?))
}

/// The models, of a connection about machines of the one architecture whose features are known.
async fn comparable(call: &Call) -> Result<Catalogue, VirError> {
    let facts = super::connect::facts(call)?;
    if facts.architecture != "x86_64" {
        let text = format!("CPUs of '{}' are not compared", facts.architecture);
        return Err(VirError::new(Code::OperationUnsupported, Part::Cpu, text));
    }
    let catalogue = catalogue(call).await?;
    if catalogue.models.is_empty() {
        let text = "this host has no QEMU, which is what knows CPU models";
        return Err(VirError::new(Code::OperationUnsupported, Part::Cpu, text));
    }
    Ok(catalogue)
}

fn compared(host: &Host, xml: &str, catalogue: &Catalogue, flags: u32) -> Answered {
    let cpu = cpu::read(xml, catalogue)?;
    match cpu::compare(host, &cpu, catalogue)? {
        Comparison::Incompatible(why) if flags & FAIL_INCOMPATIBLE != 0 => {
            Err(VirError::new(Code::CpuIncompatible, Part::Cpu, why))
        }
        Comparison::Incompatible(_) => Ok(int(0)),
        Comparison::Identical => Ok(int(1)),
        Comparison::Superset => Ok(int(2)),
    }
}

/// `CONNECT_COMPARE_CPU`
pub async fn compare(call: Call) -> Answered {
    let (xml, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    call.known_flags(flags, FAIL_INCOMPATIBLE | VALIDATE)?;
    let catalogue = comparable(&call).await?;
    let host = host(&call).await?.ok_or_else(|| {
        VirError::new(
            Code::OperationUnsupported,
            Part::Cpu,
            "this host's kernel lists no features of its CPU",
        )
    })?;
    compared(&host, &xml, &catalogue, flags)
}

/// Emulator, architecture, machine and kind of domain.
fn hypervisor(r: &mut Reader<'_>) -> Result<[Option<String>; 4], VirError> {
    let mut next = || r.option(|r| r.string());
    Ok([next()?, next()?, next()?, next()?])
}

/// Demands that it is the hypervisor of this host.
fn demand(call: &Call, [_, arch, _, kind]: [Option<String>; 4]) -> Result<(), VirError> {
    super::connect::demand_machines(call, arch.as_deref(), kind.as_deref()).map(drop)
}

/// `CONNECT_COMPARE_HYPERVISOR_CPU`
pub async fn compare_hypervisor(call: Call) -> Answered {
    let (of, xml, flags) = call.arguments(|r| Ok((hypervisor(r)?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, FAIL_INCOMPATIBLE | VALIDATE)?;
    demand(&call, of)?;
    let catalogue = comparable(&call).await?;
    compared(&catalogue.hypervisor()?, &xml, &catalogue, flags)
}

fn read_all(documents: &[String], catalogue: &Catalogue) -> Result<Vec<Cpu>, VirError> {
    documents.iter().map(|d| cpu::read(d, catalogue)).collect()
}

/// `CONNECT_BASELINE_CPU`
pub async fn baseline(call: Call) -> Answered {
    let (documents, flags) = call.arguments(|r| Ok((r.array(MOST, |r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, EXPAND | MIGRATABLE)?;
    let catalogue = comparable(&call).await?;
    let cpus = read_all(&documents, &catalogue)?;
    Ok(text(&cpu::baseline(&cpus, &catalogue, None, flags & EXPAND != 0, flags & MIGRATABLE != 0)?))
}

/// `CONNECT_BASELINE_HYPERVISOR_CPU`
pub async fn baseline_hypervisor(call: Call) -> Answered {
    let (of, documents, flags) =
        call.arguments(|r| Ok((hypervisor(r)?, r.array(MOST, |r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, EXPAND | MIGRATABLE)?;
    demand(&call, of)?;
    let catalogue = comparable(&call).await?;
    let cpus = read_all(&documents, &catalogue)?;
    let limit = catalogue.hypervisor()?;
    let (expand, migratable) = (flags & EXPAND != 0, flags & MIGRATABLE != 0);
    Ok(text(&cpu::baseline(&cpus, &catalogue, Some(&limit), expand, migratable)?))
}
