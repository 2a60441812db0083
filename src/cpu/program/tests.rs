//! What the recorder makes of operations.

use super::*;
use crate::cpu::Activation;

fn shape(out: usize, cols: usize) -> LinearShape {
    LinearShape {
        out,
        cols,
        quantized: true,
    }
}

const QKV: QkvShape = QkvShape {
    q_size: 8,
    kv_size: 8,
};

#[test]
fn buffers_are_used_again_and_norms_before_linear_layers_quantize() {
    let mut program = Program::default();
    let mut states = program.embed(0, 8, 1.0);
    let mut normed = program.norm(states, 1, 8).unwrap();
    for layer in 0..3 {
        let qkv = program.linear(normed, 2, shape(24, 8)).unwrap();
        let queries = program.rope_and_cache(qkv, layer, [None; 3], QKV).unwrap();
        let attended = program.attention(queries, layer, (None, None), 8).unwrap();
        let output = program.linear(attended, 3, shape(8, 8)).unwrap();
        (normed, states) = program.add_norm((output, states), 1.0, 4, 8).unwrap();
    }
    program.finish(normed).unwrap();
    // States, qkv and one more at a time: norm, attention and their successors take turns.
    assert_eq!(program.buffers.len(), 3);
    assert!(program.buffers.iter().max() == Some(&24));
    let quantized: Vec<bool> = program
        .ops
        .iter()
        .filter_map(|op| match op {
            Op::Linear { quantized, .. } => Some(*quantized),
            _ => None,
        })
        .collect();
    assert_eq!(quantized, [true, false, true, false, true, false]);
}

#[test]
fn a_value_that_is_read_twice_keeps_its_buffer() {
    let mut program = Program::default();
    let states = program.embed(0, 8, 1.0);
    let normed = program.norm(states, 1, 8).unwrap();
    let gate_up = program.linear(normed, 2, shape(16, 8)).unwrap();
    let inner = program
        .activate(gate_up, Activation::Silu, true, None)
        .unwrap();
    let down = program.linear(inner, 3, shape(8, 8)).unwrap();
    let other = program.linear(normed, 4, shape(8, 8)).unwrap();
    let sum = program.add(down, other, 1.0).unwrap();
    let sum = program.add(sum, states, 1.0).unwrap();
    program.finish(sum).unwrap();
    let mut normed_in = Vec::new();
    for op in &program.ops {
        if let Op::Linear {
            x, weight: 2 | 4, ..
        } = op
        {
            normed_in.push(x.buffer);
        }
        if let Op::Linear {
            out, weight: 2 | 3, ..
        } = op
        {
            assert_ne!(Some(&out.buffer), normed_in.first());
        }
    }
    assert_eq!(normed_in[0], normed_in[1]);
}

#[test]
fn a_draft_comes_after_the_sampling_and_leaves_what_is_sampled_alone() {
    let mut program = Program::default();
    let states = program.embed(0, 8, 1.0);
    let error = program.embed_next(0, 8, 1.0).unwrap_err();
    assert!(error.message.contains("not sampled yet"), "{error}");
    let error = program.begin_draft(states).unwrap_err();
    assert!(error.message.contains("samples once"), "{error}");
    let normed = program.norm(states, 1, 8).unwrap();
    let rows = program.gather_rows(normed).unwrap();
    program.begin_draft(rows).unwrap();
    let next = program.embed_next(0, 8, 1.0).unwrap();
    let error = program.join(next, rows).unwrap_err();
    assert!(error.message.contains("as many rows"), "{error}");
    let joined = program.join(next, normed).unwrap();
    let guess = program.linear(joined, 2, shape(8, 16)).unwrap();
    let error = program.finish_draft(guess, 3, 8).unwrap_err();
    assert!(error.message.contains("takes the sampled rows"), "{error}");
    let guess = program.gather_rows(guess).unwrap();
    program.finish_draft(guess, 3, 8).unwrap();
    let (sampled, draft) = (program.result.unwrap(), program.draft.unwrap());
    assert_eq!((draft.first, draft.head), (3, 3));
    assert_ne!(sampled.buffer, draft.states.buffer);
    // Nobody may write over what is sampled from.
    for op in &mut program.ops[draft.first..] {
        if let Op::EmbedNext { out, .. } | Op::Join { out, .. } | Op::Linear { out, .. } = op {
            assert_ne!(out.buffer, sampled.buffer);
        }
    }
}

#[test]
fn a_linear_layer_first_in_a_draft_quantizes_its_own_rows() {
    let mut program = Program::default();
    let states = program.embed(0, 8, 1.0);
    let rows = program.gather_rows(states).unwrap();
    let normed = program.norm(rows, 1, 8).unwrap();
    program.begin_draft(normed).unwrap();
    let guess = program.linear(normed, 2, shape(8, 8)).unwrap();
    program.finish_draft(guess, 3, 8).unwrap();
    let Some(Op::Linear { quantized, .. }) = program.ops.last() else {
        panic!("{:?}", program.ops);
    };
    assert!(!quantized);
}

#[test]
fn wrong_widths_unknown_values_and_consumed_ones_are_refused() {
    let mut program = Program::default();
    let states = program.embed(0, 8, 1.0);
    let error = program.norm(states, 1, 9).unwrap_err();
    assert!(
        error.message.contains("rows of 9, but rows of 8"),
        "{error}"
    );
    let error = program.attention(7, 0, (None, None), 8).unwrap_err();
    assert!(error.message.contains("no value 7"), "{error}");
    let other = program.embed(0, 8, 1.0);
    let sum = program.add(other, states, 1.0).unwrap();
    let error = program.norm(states, 1, 8).unwrap_err();
    assert!(
        error.message.contains("has consumed the value 0"),
        "{error}"
    );
    assert!(program.add(sum, sum, 1.0).is_err());
    let some = program.gather_rows(other).unwrap();
    let error = program.add(some, sum, 1.0).unwrap_err();
    assert!(error.message.contains("as many rows"), "{error}");
    let gelu = Activation::Gelu;
    let error = program.activate(other, gelu, false, Some((sum, 1)));
    assert!(error.unwrap_err().message.contains("8 columns from 1 on"));
}
